"""Conversations: each turn waits for the answer to the one before it, and carries it as the endpoint gave it."""

from __future__ import annotations

import collections
import json

import pytest
from running import Run
from servers import DONE, Server, answer, event, event_loop, mock_server, settings, streamed, usage

import llmbench

THREE = ["What is it?", "And then?", "Why?"]


def talk(name, *turns):
    """A prompt with so many turns of the user's."""
    messages = [[{"role": "user", "content": text}] for text in turns]
    return llmbench.Prompt(name, messages[0], None, messages[1:])


def play(url, prompts, **given):
    """A run of these prompts: its records by request number, and the exceptions that reached the loop."""
    lines, complaints = [], []
    config = settings(url, **given)
    with event_loop(complaints) as (loop, poll):
        provider = llmbench.make_provider(config)
        endpoint = llmbench.parse_url(config.url, provider)
        runner = llmbench.Runner(config, provider, endpoint, prompts, llmbench.Part(), poll, lines.append)
        loop.run_until_complete(runner.run(llmbench.plan_stages(config)))
    assert not complaints
    records = [line for line in lines if "request_id" in line]
    return {int(record["request_id"].rpartition("-")[2]): record for record in records}


def echo(*pieces):
    """Answers with these pieces and the number of the request."""

    def behave(peer, request):
        texts = [*pieces, " #%d" % request.number]
        peer.send(streamed(*(event(text) for text in texts), event(finish="stop"), usage(2), DONE))

    return behave


def bodies_of(server):
    return {int(request.id.rpartition("-")[2]): request.fields["messages"] for request in server.requests}


PIECES = [["Sure", ", ok"], ["<think>hm</think>", "Sure"], ["a \"quote\"\n", "日本", "ok"] * 40]


@pytest.mark.parametrize("pieces", PIECES)
def test_a_turn_carries_what_the_endpoint_answered(pieces):
    with Server(echo(*pieces)) as server:
        records = play(server.url, [talk("t", *THREE)], total_requests=3, unique=False)
    said = "".join(pieces).replace("<think>hm</think>", "")
    first, second, third = (bodies_of(server)[number] for number in range(3))
    assert first == [{"role": "user", "content": THREE[0]}]
    assert second == [*first, {"role": "assistant", "content": said + " #0"}, {"role": "user", "content": THREE[1]}]
    assert third == [*second, {"role": "assistant", "content": said + " #1"}, {"role": "user", "content": THREE[2]}]
    assert [records[number].get("turn") for number in range(3)] == [None, 2, 3]
    assert {record["prompt_id"] for record in records.values()} == {"t"}


def test_a_turn_is_due_when_the_one_before_it_was_answered():
    with Server(echo("x")) as server:
        records = play(server.url, [talk("t", *THREE)], total_requests=3)
    for number in (1, 2):
        before = records[number - 1]
        assert records[number]["scheduled_ms"] >= before["start_ms"] + before["latency_ms"]
        assert records[number]["reused"]


def test_one_unique_prefix_stands_at_the_head_of_a_conversation():
    with Server(echo("x")) as server:
        play(server.url, [talk("t", *THREE)], total_requests=6)
    bodies = bodies_of(server)
    heads = [bodies[number][0]["content"] for number in range(6)]
    assert len(set(heads[:3])) == 1 and len(set(heads[3:])) == 1 and heads[0] != heads[3]
    assert bodies[2][2]["content"] == THREE[1]


def test_a_turn_that_fails_ends_its_conversation_and_the_next_one_begins():
    def behave(peer, request):
        if len(request.fields["messages"]) == 3:  # a second turn
            peer.send(answer(500, {"error": {"message": "no"}}))
        else:
            echo("x")(peer, request)

    with Server(behave) as server:
        records = play(server.url, [talk("t", *THREE), talk("u", "one")], total_requests=8)
    told = {number: (record["prompt_id"], record["status"]) for number, record in records.items()}
    assert told == {
        0: ("t", "ok"), 1: ("t", "http_error"), 3: ("u", "ok"), 4: ("t", "ok"), 5: ("t", "http_error"), 7: ("u", "ok"),
    }  # fmt: skip


def test_turns_that_were_never_made_are_told(tmp_path):
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": text} for text in THREE]}]), "utf-8")
    with mock_server("--ttft", "2", "--itl", "1", "--tokens", "2", "--fault", "http500:1") as url:
        done = Run(tmp_path / "a", "--url", url, "--workload-file", str(path), "--total-requests", "6").wait()
    assert done.summary["requests"]["total"] == 2
    assert done.summary["requests"]["unmade"] == 4
    reasons = {reason["key"]: reason["values"] for reason in done.summary["verdict"]["reasons"]}
    assert reasons["unmade"] == {"n": 4}
    assert "4 of the planned requests were never made" in " ".join(done.stdout.split())


@pytest.mark.parametrize("most,turns", [(1, {None: 6}), (2, {None: 3, 2: 3}), (None, {None: 2, 2: 2, 3: 2})])
def test_turns_bounds_how_long_a_conversation_is_played(most, turns):
    with Server(echo("x")) as server:
        records = play(server.url, [talk("t", *THREE)], total_requests=6, turns=most)
    assert collections.Counter(record.get("turn") for record in records.values()) == turns


def test_conversations_are_played_at_once_on_streams_of_their_own():
    with Server(echo("x")) as server:
        records = play(server.url, [talk(name, *THREE) for name in "abcd"], total_requests=24, concurrency=[4])
    assert len(records) == 24
    asked = bodies_of(server)
    for number, record in records.items():
        assert len(asked[number]) == 2 * record.get("turn", 1) - 1


def test_an_open_loop_begins_conversations_when_they_are_due():
    with Server(echo("x")) as server:
        records = play(
            server.url, [talk("t", *THREE)], total_requests=30, rps=[50.0], concurrency=[], arrival="constant"
        )
    firsts = [record["scheduled_ms"] for _, record in sorted(records.items()) if "turn" not in record]
    assert [round(later - earlier) for earlier, later in zip(firsts, firsts[1:])] == [20] * 9
    assert len(records) == 30


def test_a_file_of_conversations_is_played_as_it_stands(tmp_path):
    path = tmp_path / "share.json"
    path.write_text(json.dumps([
        {"id": "a", "conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "One"},
            {"from": "gpt", "value": "never"}, {"from": "human", "value": "Two"},
        ]},
    ]), "utf-8")  # fmt: skip
    workload = llmbench.read_workload(str(path), [])
    with Server(echo("x")) as server:
        play(server.url, workload.prompts, total_requests=2, unique=False)
    assert bodies_of(server)[1] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"},
        {"role": "assistant", "content": "x #0"}, {"role": "user", "content": "Two"},
    ]  # fmt: skip
