"""Connections over real loopback sockets: when bytes arrived, and endpoints that cannot be reached."""

from __future__ import annotations

import asyncio
import contextlib
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
from certificates import Authority
from servers import (
    HELLO,
    PATIENCE,
    Server,
    closed_port,
    event,
    event_loop,
    full_listener,
    measure,
    says,
    settings,
    streamed,
)  # fmt: skip

import llmbench

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's stamps are Linux's")
EARLY, LATE = 0.0005, 0.05  # s by which an arrival may differ from the sender's own times of its send
BLOCKED = 0.2  # s for which the loop is held up


# A receiver and a network for one connection.


class Receiver:
    """Keeps what a connection hands over, and wakes whoever waits for it."""

    def __init__(self, then=None):
        self.arrivals, self.ending, self.then = [], None, then
        self.changed = asyncio.Event()

    def received(self, data, stamp, now, look, read, kernel):
        self.arrivals.append(
            types.SimpleNamespace(data=data, stamp=stamp, now=now, look=look, read=read, kernel=kernel)
        )
        self.changed.set()
        if self.then:
            self.then(self)

    def lost(self, clean, reason):
        self.ending = (clean, reason)
        self.changed.set()

    @property
    def data(self):
        return b"".join(arrival.data for arrival in self.arrivals)

    async def wait_for(self, condition):
        while not condition(self):
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), PATIENCE)


@contextlib.contextmanager
def network_to(url, **given):
    """The event loop, and a network to that URL."""
    with event_loop() as (loop, poll):
        config = settings(url, **given)
        endpoint = llmbench.parse_url(url, llmbench.make_provider(config))
        yield loop, llmbench.Network(endpoint, config, poll)


REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"


def converse(url, block=0.0, until=lambda receiver: receiver.data.endswith(b"!"), then=None, **given):
    """Sends a request, holds the loop up for `block` s at once, and gives the receiver and the moment of the start."""
    with network_to(url, **given) as (loop, network):

        async def talk():
            connection = await network.open()
            receiver = Receiver(then)
            start = connection.send(REQUEST, receiver)
            time.sleep(block)  # the loop does not look meanwhile  # noqa: ASYNC251
            await receiver.wait_for(until)
            connection.close()
            return receiver, start

        return loop.run_until_complete(talk())


def fail_to_open(url, **given):
    """The RequestError that opening a connection raises, and how long it took."""
    with network_to(url, **given) as (loop, network):
        began = llmbench.clock()
        with pytest.raises(llmbench.RequestError) as caught:
            loop.run_until_complete(network.open())
        return caught.value, llmbench.clock() - began


# Certificates.


@pytest.fixture(params=["plain", "tls"])
def wire(request):
    """Both kinds of connection: the server's TLS context and the client's settings."""
    if request.param == "plain":
        return None, {}
    return request.getfixturevalue("good_tls"), {"ca_cert": str(request.getfixturevalue("authority").certificate)}


# When bytes arrived.


@linux
def test_arrival_is_the_kernels_however_late_the_loop_looks(wire):
    tls, given = wire
    with Server(says(b"hello!"), tls) as server:
        receiver, _ = converse(server.url, block=BLOCKED, **given)
        before, after = server.peers[0].sent[0]
    (arrival,) = receiver.arrivals
    assert arrival.kernel
    assert before - EARLY <= arrival.stamp <= after + LATE
    assert arrival.now >= arrival.stamp + BLOCKED / 2, "the loop was held up, so the time of reading is much later"


@linux
def test_one_read_of_several_segments_has_the_newest_stamp_and_look_bounds_the_oldest(wire):
    tls, given = wire
    paused = threading.Event()

    def behave(peer, _):
        for piece in (b"one ", b"two ", b"three!"):
            peer.send(piece)
            paused.wait(0.02)  # never set: the pieces go out 20 ms apart

    with Server(behave, tls) as server:
        receiver, _ = converse(server.url, block=BLOCKED, **given)
        (first, _), (before, after) = server.peers[0].sent[0], server.peers[0].sent[-1]
    assert len({arrival.read for arrival in receiver.arrivals}) == 1, "one read brings all three"
    for arrival in receiver.arrivals:
        assert before - EARLY <= arrival.stamp <= after + LATE
        assert arrival.look <= first + EARLY, "what came first can't have come before the loop looked"


@linux
def test_bytes_that_end_a_wait_arrived_when_the_loop_looked(wire):
    tls, given = wire

    def behave(peer, _):
        time.sleep(0.05)  # so that the loop is idle when the bytes come
        peer.send(b"late!")

    for _ in range(20):  # a busy machine may wake the loop late, and then the poll before bounds what it brought
        with Server(behave, tls) as server:
            receiver, start = converse(server.url, **given)
            before, after = server.peers[0].sent[0]
        (arrival,) = receiver.arrivals
        if arrival.now - arrival.stamp < llmbench.LATE_WAKE and arrival.look - start >= 0.05:
            break
    assert arrival.kernel
    assert before - EARLY <= arrival.stamp <= after + LATE
    assert before - EARLY <= arrival.look <= arrival.now, "it had to wait, so look is the poll's return"
    assert arrival.look - start >= 0.05, "idle time is not lag"


def waited(before, look):
    """A poll that was asked at one moment and returned at another."""
    poll = types.SimpleNamespace(offset=0.0, look=look, before=before, resting=[], give_way=lambda: None)
    poll.wake_was_late = lambda: llmbench.Poll.wake_was_late(poll)
    return poll


@pytest.mark.parametrize("stamp, look", [(100.0, 90.0), (100.0495, 100.05), (100.06, 100.05)])
def test_a_wait_that_ended_late_is_no_bound_for_what_it_brought(monkeypatch, stamp, look):
    """It waited since 90.0 and was woken at 100.05: what came well before that came while the process could not run."""
    transport = types.SimpleNamespace(set_protocol=lambda _: None, write=lambda _: None, abort=lambda: None)
    sock = types.SimpleNamespace(stamp=stamp, reads=1)
    poll = waited(90.0, 100.05)
    connection = llmbench.Connection(sock, types.SimpleNamespace(transport=transport), poll, 0.0)
    monkeypatch.setattr(llmbench, "clock", lambda: 100.1)
    seen = []
    connection.send(b"", types.SimpleNamespace(received=lambda *read: seen.append(read[3])))
    connection.data_received(b"x")
    assert seen == [look]
    assert poll.look == look, "holds for what other connections brought in the same poll"


def test_a_late_wake_that_a_later_read_shows_holds_for_the_earlier_ones(monkeypatch):
    """What came just before the return looks prompt; another connection of the same poll knows better."""
    transport = types.SimpleNamespace(set_protocol=lambda _: None, write=lambda _: None, abort=lambda: None)
    poll = waited(90.0, 100.05)
    monkeypatch.setattr(llmbench, "clock", lambda: 100.1)
    told = []
    for name, stamp, rests in (("burst", 100.0495, True), ("alone", 100.0496, False), ("late", 100.0, True)):
        sock = types.SimpleNamespace(stamp=stamp, reads=1)
        connection = llmbench.Connection(sock, types.SimpleNamespace(transport=transport), poll, 0.0)
        receiver = types.SimpleNamespace(
            received=lambda *_, rests=rests: rests, look_again=lambda look, name=name: told.append((name, look))
        )
        connection.send(b"", receiver)
        connection.data_received(b"x")
    assert told == [("burst", 90.0)], "the late one was given the right look at once"


def test_without_kernel_stamps_the_time_of_reading_serves(monkeypatch):
    monkeypatch.setattr(llmbench, "SO_TIMESTAMPNS", None)
    with Server(says(b"hello!")) as server:
        receiver, _ = converse(server.url, block=0.05)
    (arrival,) = receiver.arrivals
    assert not arrival.kernel
    assert arrival.stamp == arrival.now


def test_a_run_without_kernel_stamps_says_so(monkeypatch):
    with Server(says(HELLO)) as server:
        if llmbench.SO_TIMESTAMPNS is not None:
            assert [record["clock"] for record in measure(server.url, total_requests=2).records] == ["kernel"] * 2
        monkeypatch.setattr(llmbench, "SO_TIMESTAMPNS", None)
        records = measure(server.url, total_requests=2).records
    assert [record["clock"] for record in records] == ["user"] * 2
    assert [record["status"] for record in records] == ["ok"] * 2


@linux
def test_a_run_of_tcp_info_and_stamps_over_tls(good_tls, authority):
    with Server(says(HELLO), good_tls) as server:
        records = measure(server.url, total_requests=4, ca_cert=str(authority.certificate)).records
    assert [(record["status"], record["clock"]) for record in records] == [("ok", "kernel")] * 4
    assert records[0]["connect_ms"] > 0.3, "a TLS handshake takes its time"
    for record in records:
        assert 0.0 < record["rtt_ms"] < 1000.0
        assert record["retransmits"] == 0


@linux
@pytest.mark.parametrize("error", [30.0, -30.0])
def test_a_stamp_that_cannot_be_is_not_believed(monkeypatch, error):
    """A wall clock that was set by half a minute between two reads: in the future, or before the previous stamp."""
    note = llmbench.StampedSocket._note

    def wrong(sock, *words):
        note(sock, *words)
        sock.stamp += error * (sock.reads > 1)

    monkeypatch.setattr(llmbench.StampedSocket, "_note", wrong)
    released = threading.Event()

    def behave(peer, _):
        peer.send(b"first ")
        released.wait(PATIENCE)
        peer.send(b"second!")

    with Server(behave) as server:
        receiver, _ = converse(server.url, then=lambda _: released.set())
    first, second = receiver.arrivals
    assert (first.kernel, second.kernel) == (True, False)
    assert second.stamp == second.now


def hand_over(monkeypatch, *reads):
    """Feeds a connection with reads of (stamp or 0, now) and gives (arrival, kernel) for each."""
    transport = types.SimpleNamespace(set_protocol=lambda _: None, write=lambda _: None, abort=lambda: None)
    sock = types.SimpleNamespace(stamp=0.0, reads=0)
    poll = waited(0.0, 0.0)
    connection = llmbench.Connection(sock, types.SimpleNamespace(transport=transport), poll, 0.0)
    seen = []
    monkeypatch.setattr(llmbench, "clock", lambda: now)
    now = 99.0
    receiver = types.SimpleNamespace(
        received=lambda data, stamp, now, look, read, kernel: seen.append((stamp, kernel)), lost=lambda *_: None
    )
    connection.send(b"", receiver)
    for stamp, now in reads:  # noqa: B007
        sock.stamp, sock.reads = stamp, sock.reads + 1
        connection.data_received(b"x")
    return seen


@pytest.mark.parametrize(
    "reads, arrivals",
    [
        ([(100.0, 100.1), (100.05, 100.1)], [(100.0, True), (100.05, True)]),
        ([(100.0, 100.1), (100.0, 100.1)], [(100.0, True), (100.0, True)]),  # TLS: two records of one read
        ([(100.000003, 100.0)], [(100.0, True)]),  # two clocks can't be read at the same moment
        ([(100.1, 100.0)], [(100.0, False)]),  # the future
        ([(100.0, 100.0), (99.9, 100.2)], [(100.0, True), (100.2, False)]),  # before the previous stamp
        ([(0.0, 100.0)], [(100.0, False)]),  # none
    ],
)
def test_which_stamps_are_believed(monkeypatch, reads, arrivals):
    assert hand_over(monkeypatch, *reads) == arrivals


@pytest.mark.parametrize("odd", [99.9, 0.0])
def test_a_time_of_reading_is_no_stamp_that_later_ones_must_follow(monkeypatch, odd):
    """A late loop reads at 100.2 without a stamp to believe; what it reads next was stamped 100.1, and that is true."""
    seen = hand_over(monkeypatch, (100.0, 100.0), (odd, 100.2), (100.1, 100.3))
    assert seen == [(100.0, True), (100.2, False), (100.1, True)]


# Poll.


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.closing(llmbench.Poll()) as poll:
        poll.register(ours, llmbench.selectors.EVENT_READ)
        yield poll, ours, theirs


def test_poll_that_had_to_wait_looks_at_its_return(pair):
    poll, _, theirs = pair
    moments = []

    def send():
        moments.append(llmbench.clock())
        theirs.send(b"x")

    timer = threading.Timer(0.05, send)
    timer.start()
    assert poll.select(PATIENCE)
    assert moments[0] <= poll.look <= llmbench.clock()
    assert poll.look == poll.returned
    assert poll.longest < 0.04, "waiting is not a delay of the loop's own"
    timer.join()


@pytest.mark.parametrize("took, late", [(0.0, False), (0.0005, False), (0.02, True)])
def test_poll_that_another_thread_kept_waiting_looks_before_its_wait(pair, monkeypatch, took, late):
    """A thread that holds the interpreter's lock delays our return, and no stamp needs to show it."""
    poll, _, theirs = pair
    times = iter((7.0 + took, 7.0 + took))
    monkeypatch.setattr(llmbench, "time_of_others", lambda: next(times))
    monkeypatch.setattr(threading, "active_count", lambda: 2)  # the timer may be over by then
    poll._others = 7.0
    for _ in range(2):  # what is over is no reason to doubt the poll that comes next
        timer = threading.Timer(0.03, theirs.send, [b"x"])
        timer.start()
        asked = llmbench.clock()
        assert poll.select(PATIENCE)
        assert poll.look == (poll.before if late else poll.returned)
        assert asked <= poll.before < asked + 0.03 <= poll.returned
        pair[1].recv(10)
        timer.join()
        late = False


def test_the_cpu_is_given_away_between_the_requests_of_a_turn(monkeypatch):
    """Not before the first, and not again soon to somebody who kept it: 50 times as long as that took."""
    poll, moment, given = llmbench.Poll(), [100.0], []
    monkeypatch.setattr(llmbench, "clock", lambda: moment[0])

    def take(seconds):
        given.append(moment[0])
        moment[0] += seconds

    for turn, (took, gives) in enumerate([(0.0001, 3), (0.004, 1), (0.0001, 0), (0.0001, 0), (0.9, 0), (0.0009, 5)]):
        monkeypatch.setattr(llmbench, "sched_yield", lambda took=took: take(took))
        poll.polls = turn
        moment[0] += 1.0 if took == 0.9 else 0.0
        for _ in range(1 if took == 0.9 else 10 if gives == 5 else 4):
            poll.give_way()
        assert len(given) == gives, turn
        given.clear()


def test_the_time_of_others_is_that_of_other_threads():
    begin, over = threading.Event(), threading.Event()

    def work():
        begin.wait(PATIENCE)
        deadline = time.thread_time() + 0.05
        while time.thread_time() < deadline:
            pass
        over.wait(PATIENCE)

    thread = threading.Thread(target=work)
    thread.start()
    before, own = llmbench.time_of_others(), time.thread_time()
    while time.thread_time() < own + 0.05:
        pass
    assert llmbench.time_of_others() - before < 0.02, "this thread's own time is not that of others"
    begin.set()
    deadline = time.monotonic() + PATIENCE
    while llmbench.time_of_others() - before < 0.05 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert llmbench.time_of_others() - before >= 0.05
    over.set()
    thread.join()


@pytest.mark.parametrize("timeout", [None, 1.0, 0])
def test_poll_that_returned_at_once_looked_when_the_one_before_asked(pair, timeout):
    poll, _, theirs = pair
    asked = llmbench.clock()
    assert poll.select(0) == []
    before = poll.returned
    theirs.send(b"x")
    time.sleep(0.03)
    assert poll.select(timeout)
    assert asked <= poll.look <= before, "not its return: what came meanwhile it has not seen"
    assert poll.returned >= before + 0.03
    assert poll.longest >= 0.03, "the loop was away for that long"
    assert poll.polls == 2


def test_poll_knows_the_distance_of_the_two_clocks(pair):
    poll, _, _ = pair
    poll.select(0)
    assert abs(poll.offset - (time.monotonic() - time.time())) < 0.005


# TCP_INFO.


@linux
def test_path_of_a_connection():
    with Server(says(b"hello!")) as server, network_to(server.url) as (loop, network):
        connection = loop.run_until_complete(network.open())
        path = connection.measure_path()
        assert 0.0 < path.rtt < 1.0, "loopback answers within a second, and not in no time"
        assert path.retransmits == 0
        assert path.out_of_order in (0, None)
        assert connection.measure_path().retransmits == 0, "counters are differences since the last call"
        connection.close()


def test_path_of_what_is_no_tcp_socket_is_unknown():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert llmbench.read_path(ours) == (None, None, None)


# TLS.


@pytest.mark.parametrize("given", [{}, {"directory": True}, {"insecure": True}])
def test_tls_that_is_trusted(authority, good_tls, given, tmp_path):
    with Server(says(b"hello!"), good_tls) as server:
        if given.pop("directory", False):
            shutil.copy(str(authority.certificate), str(tmp_path / "ca.pem"))
            subprocess.run(["openssl", "rehash", str(tmp_path)], check=True)
            given = {"ca_cert": str(tmp_path)}
        elif not given:
            given = {"ca_cert": str(authority.certificate)}
        receiver, _ = converse(server.url, **given)
        assert receiver.data == b"hello!"
        assert llmbench.make_tls(settings(server.url, **given)).check_hostname == ("insecure" not in given)


def test_unknown_authority_is_a_tls_error_with_the_way_out(good_tls, tmp_path):
    other = Authority(tmp_path)
    with Server(says(b"hello!"), good_tls) as server:
        for given in ({}, {"ca_cert": str(other.certificate)}):
            error, _ = fail_to_open(server.url, **given)
            assert error.status == "tls_error"
            assert "certificate" in str(error) and "--ca-cert" in str(error) and "--insecure" in str(error)


def test_wrong_name_is_a_tls_error(authority):
    with Server(says(b"hello!"), authority.server_side("elsewhere")) as server:
        error, _ = fail_to_open(server.url, ca_cert=str(authority.certificate))
        assert error.status == "tls_error"
        assert "127.0.0.1" in str(error)
        receiver, _ = converse(server.url, insecure=True)
        assert receiver.data == b"hello!"


def test_tls_towards_plain_http_is_a_tls_error_with_a_hint():
    def greet(peer, _):
        peer.wait_for_bytes()
        peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        peer.hold()

    with Server(says(b""), greet=greet) as server:
        error, _ = fail_to_open(server.url.replace("http:", "https:"))
    assert error.status == "tls_error"
    assert "use http://" in str(error)


def test_plain_http_towards_tls_is_a_parse_error_or_a_cut(good_tls):
    with Server(says(b"hello!"), good_tls) as server:
        (record,) = measure(server.url.replace("https:", "http:"), total_requests=1).records
    assert record["status"] in ("parse_error", "truncated")


def test_peer_that_hangs_in_the_handshake_times_out():
    with Server(says(b""), greet=lambda peer, _: peer.hold()) as server:
        error, seconds = fail_to_open(server.url.replace("http:", "https:"), connect_timeout=0.3)
    assert error.status == "timeout"
    assert "TLS" in str(error) and "0.3s" in str(error)
    assert 0.25 < seconds < 2


def test_peer_that_goes_in_the_handshake_is_a_tls_error():
    with Server(says(b""), greet=lambda peer, _: peer.close()) as server:
        error, _ = fail_to_open(server.url.replace("http:", "https:"))
    assert error.status == "tls_error"


def test_unreadable_authority_is_a_user_error(tmp_path):
    (tmp_path / "none.pem").write_text("nothing")
    for path in (tmp_path / "none.pem", tmp_path / "missing.pem"):
        with pytest.raises(llmbench.UserError, match="--ca-cert"):
            llmbench.make_tls(settings("https://127.0.0.1", ca_cert=str(path)))


# An endpoint that cannot be reached.


def test_unknown_host_is_a_dns_error(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    error, _ = fail_to_open("http://no-such-host.invalid")
    assert error.status == "dns_error"
    assert "no-such-host.invalid" in str(error)


@pytest.mark.parametrize("host", ["10.0.0..1", "a" * 64 + ".example"])
def test_host_that_can_be_no_name_is_a_dns_error(host):
    error, _ = fail_to_open("http://%s:1" % host)
    assert error.status == "dns_error"
    assert host in str(error)


def test_lookup_that_hangs_times_out(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(PATIENCE) and [])
    began = time.monotonic()
    with event_loop() as (loop, poll):
        endpoint = llmbench.parse_url("http://slow.invalid", llmbench.make_provider(settings("")))
        network = llmbench.Network(endpoint, settings("", connect_timeout=0.2), poll)
        with pytest.raises(llmbench.RequestError, match="host name") as caught:
            loop.run_until_complete(network.open())
        seconds = time.monotonic() - began
        released.set()
    assert caught.value.status == "timeout"
    assert seconds < 2


def test_refused_connection():
    port = closed_port()
    error, _ = fail_to_open("http://127.0.0.1:%d" % port)
    assert error.status == "connect_error"
    assert "refused" in str(error) and str(port) in str(error)


@linux
def test_connection_that_nobody_takes_times_out():
    with full_listener() as port:
        error, seconds = fail_to_open("http://127.0.0.1:%d" % port, connect_timeout=0.3)
    assert error.status == "timeout"
    assert "connect time-out (0.3s)" in str(error)
    assert 0.25 < seconds < 2


def resolve_to(monkeypatch, *addresses):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: asked.append(words) or answer)
    return asked


@linux
@pytest.mark.parametrize("first", ["refuses", "is silent"])
def test_the_second_address_serves_where_the_first_fails(monkeypatch, first):
    with Server(says(b"hello!")) as server, full_listener() as silent:
        bad = closed_port() if first == "refuses" else silent
        resolve_to(monkeypatch, ("127.0.0.1", bad), ("127.0.0.1", server.port))
        receiver, _ = converse("http://two.invalid", connect_timeout=1.0)
    assert receiver.data == b"hello!"


def test_one_lookup_serves_all_connections(monkeypatch):
    with Server(says(HELLO, "close")) as server:
        asked = resolve_to(monkeypatch, ("127.0.0.1", server.port))
        measured = measure("http://many.invalid:%d" % server.port, concurrency=4, total_requests=12)
        assert measured.statuses == ["ok"] * 12
        assert server.connections >= 12
    assert len(asked) == 1


def test_failed_lookup_is_tried_again(monkeypatch):
    with Server(says(b"hello!")) as server, network_to("http://sometimes.invalid") as (loop, network):

        def fail(*_, **__):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        with pytest.raises(llmbench.RequestError, match="emporary"):
            loop.run_until_complete(network.open())
        resolve_to(monkeypatch, ("127.0.0.1", server.port))
        loop.run_until_complete(network.open()).close()


# A peer that doesn't keep to the order of things.


def test_peer_that_speaks_first_is_no_http_server():
    with Server(says(b""), greet=lambda peer, _: peer.send(b"220 mail.example ESMTP\r\n")) as server:
        measured = measure(server.url, total_requests=3)
    assert measured.statuses == ["parse_error"] * 3
    assert not measured.complaints


def test_bytes_on_an_idle_connection_close_it():
    with Server(says(b"hello!")) as server, network_to(server.url) as (loop, network):

        async def wait_for_the_end():
            connection = await network.open()
            receiver = Receiver()
            connection.send(REQUEST, receiver)
            await receiver.wait_for(lambda receiver: receiver.data)
            connection.release()
            server.peers[0].send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            while connection.open:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

        loop.run_until_complete(asyncio.wait_for(wait_for_the_end(), PATIENCE))


def test_peer_that_accepts_and_leaves_did_not_speak(monkeypatch):
    """The connection ended without a byte, and before anyone looked: that is no answer that could be parsed."""
    connect = llmbench.Network.connect

    async def connect_and_wait(network, *words):
        sock = await connect(network, *words)
        select.select([sock], [], [], PATIENCE)  # the end is there before the first read
        return sock

    monkeypatch.setattr(llmbench.Network, "connect", connect_and_wait)
    with Server(says(b""), greet=lambda peer, _: peer.close()) as server:
        measured = measure(server.url, concurrency=2, total_requests=6)
    assert not measured.complaints
    assert measured.seconds < PATIENCE / 2
    for record in measured.records:
        assert record["status"] in ("truncated", "connect_error"), record["err"]


def test_closed_connections_leave_no_descriptor_and_no_complaint(good_tls, authority):
    """Time-outs in the handshake, resets and cut answers: nothing is left in the selector or open."""
    endings = ["close", "reset", "hold"]

    def behave(peer, request):
        peer.send(streamed(event("x"))[:-9])
        getattr(peer, endings[request.number % 3])()

    descriptors = count_descriptors()
    with Server(behave, good_tls) as server:
        measured = measure(
            server.url, concurrency=6, total_requests=12, timeout=0.5, ca_cert=str(authority.certificate)
        )
        assert set(measured.statuses) == {"truncated", "timeout"}
        assert not measured.complaints
    with Server(says(b""), greet=lambda peer, _: peer.hold()) as server:
        url = server.url.replace("http:", "https:")
        measured = measure(url, concurrency=6, total_requests=6, connect_timeout=0.2)
        assert measured.statuses == ["timeout"] * 6
        assert not measured.complaints
    for _ in range(200):  # the servers' threads close their ends in their own time
        if count_descriptors() <= descriptors:
            break
        time.sleep(0.01)
    assert count_descriptors() <= descriptors


def count_descriptors():
    return len(llmbench.os.listdir("/proc/self/fd")) if sys.platform.startswith("linux") else 0
