"""How a run is split: every stream and every request belongs to exactly one part, without the parts talking."""

from __future__ import annotations

import collections
import itertools
import statistics

import pytest

import llmbench

SPLITS = list(itertools.product(range(1, 6), range(1, 6)))  # hosts, processes on each


def parts_of(hosts, processes):
    return [llmbench.Part(k, hosts, p, processes) for k in range(hosts) for p in range(processes)]


def alone(_):
    """A conversation of one request."""
    return 1


def taken_by(part, first, last, turns=alone):
    return [
        talk.first + number
        for talk in llmbench.talks_from(first, last, turns) if part.takes(talk.number)
        for number in range(talk.turns)
    ]  # fmt: skip


@pytest.mark.parametrize("hosts,processes", SPLITS)
def test_every_request_belongs_to_exactly_one_part(hosts, processes):
    for turns in (alone, lambda number: 1 + number % 4):
        for first, last in [(0, 0), (0, 1), (0, 60), (7, 61), (13, 14)]:
            taken = [index for part in parts_of(hosts, processes) for index in taken_by(part, first, last, turns)]
            assert sorted(taken) == list(range(first, last))


@pytest.mark.parametrize("hosts,processes", SPLITS)
def test_a_part_takes_the_requests_that_the_rule_gives_it(hosts, processes):
    for part in parts_of(hosts, processes):
        expected = [i for i in range(90) if i % hosts == part.host and (i // hosts) % processes == part.process]
        assert taken_by(part, 0, 90) == expected


@pytest.mark.parametrize("hosts,processes", SPLITS)
def test_every_stream_belongs_to_exactly_one_part_and_shares_differ_by_one_at_most(hosts, processes):
    parts = parts_of(hosts, processes)
    assert [part.number for part in parts] == list(range(hosts * processes))
    for concurrency in range(70):
        shares = [llmbench.streams_of(part, concurrency) for part in parts]
        assert sum(shares) == concurrency
        assert max(shares) - min(shares) <= 1
        assert shares == sorted(shares, reverse=True)


def test_without_a_last_request_a_part_goes_on_for_ever():
    part = llmbench.Part(1, 2, 0, 1)
    endless = (talk.first for talk in llmbench.talks_from(3, None, alone) if part.takes(talk.number))
    assert list(itertools.islice(endless, 4)) == [3, 5, 7, 9]


def test_one_part_is_the_whole():
    assert taken_by(llmbench.Part(), 2, 6) == [2, 3, 4, 5]
    assert llmbench.streams_of(llmbench.Part(), 9) == 9


def test_a_conversation_is_cut_where_the_requests_end():
    assert list(llmbench.talks_from(10, 17, lambda number: 3)) == [
        llmbench.Talk(10, 10, 3), llmbench.Talk(11, 13, 3), llmbench.Talk(12, 16, 1),
    ]  # fmt: skip


def test_a_part_without_a_number_of_streams_is_in_every_stage():
    for part in parts_of(1, 4):
        assert part.at(0) == part


def drawn(arrival, rate, count, seed="arrival 0 0 measure"):
    return list(itertools.islice(llmbench.due_times(arrival, rate, seed), count))


def gaps_of(moments):
    return [later - earlier for earlier, later in zip([0.0, *moments], moments)]


def test_constant_arrivals_are_evenly_spaced_without_adding_up_an_error():
    moments = drawn("constant", 50.0, 100000)
    assert moments[0] == 0.0
    assert moments[-1] == 99999 / 50.0


SPREADS = [("poisson", 1.0), ("gamma:0.25", 4.0), ("gamma:1", 1.0), ("gamma:4", 0.25)]


@pytest.mark.parametrize(("arrival", "variance"), SPREADS)
def test_drawn_arrivals_have_the_mean_and_the_variance_that_they_should(arrival, variance):
    """Gaps in units of the mean gap; the tolerances are five standard errors of 40,000 draws."""
    gaps = [20.0 * gap for gap in gaps_of(drawn(arrival, 20.0, 40000))]
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(1.0, abs=5 * (variance / 40000) ** 0.5)
    kurtosis = 3 + 6 * variance  # of a gamma distribution of shape 1/variance
    error = variance * ((kurtosis - 1) / 40000) ** 0.5
    assert statistics.variance(gaps) == pytest.approx(variance, abs=5 * error)
    assert all(gap >= 0 for gap in gaps)


def test_poisson_counts_in_equal_spans_are_as_spread_as_they_are_many():
    moments = drawn("poisson", 10.0, 50000)
    counts = collections.Counter(int(moment) for moment in moments)
    per_second = [counts[second] for second in range(int(moments[-1]))]
    assert statistics.variance(per_second) / statistics.mean(per_second) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("times", [[0.0], [0.0] * 4, [0.0, 0.0, 1e-9]])
def test_a_trace_without_a_length_of_time_has_a_request_a_second_in_the_mean(times):
    laps = list(itertools.islice(llmbench.trace_times(times, 2.0), 3 * len(times)))
    assert [laps[lap * len(times)] for lap in range(3)] == [0.5 * lap * len(times) for lap in range(3)]
    assert llmbench.trace_rate(times, 2.0) == 2.0


def test_the_same_seed_gives_the_same_times_and_another_seed_others():
    assert drawn("poisson", 3.0, 500) == drawn("poisson", 3.0, 500)
    assert drawn("poisson", 3.0, 500) != drawn("poisson", 3.0, 500, "arrival 1 0 measure")
    assert drawn("gamma:0.5", 3.0, 500) == drawn("gamma:0.5", 3.0, 500)


def test_poisson_times_are_these_on_every_python():
    assert [round(moment, 9) for moment in drawn("poisson", 2.0, 3)] == [0.550316488, 1.375130081, 1.637334427]


@pytest.mark.parametrize("hosts,processes", SPLITS)
def test_streams_of_all_parts_begin_evenly_over_the_ramp(hosts, processes):
    begins = [
        llmbench.ramp_delay(part, stream, 30, 60.0)
        for part in parts_of(hosts, processes) for stream in range(llmbench.streams_of(part, 30))
    ]  # fmt: skip
    assert sorted(begins) == pytest.approx([2.0 * number for number in range(30)])


def test_rates_make_stages_that_have_ten_seconds_of_load():
    config = llmbench.Config(rps=[0.5, 40.0], concurrency=[])
    assert llmbench.plan_stages(config) == [
        llmbench.Stage(0, 0, 20, None, 0, 0.5), llmbench.Stage(1, 0, 400, None, 0, 40.0),
    ]  # fmt: skip
    assert [stage.load for stage in llmbench.plan_stages(config)] == [{"rps": 0.5}, {"rps": 40.0}]
    config.concurrency = [8]
    assert llmbench.plan_stages(config)[0].load == {"rps": 0.5, "cap": 8}


def test_stages_are_the_list_of_concurrencies():
    config = llmbench.Config(concurrency=[1, 8, 64], warmup=3)
    assert llmbench.plan_stages(config) == [
        llmbench.Stage(0, 1, 10, None, 3), llmbench.Stage(1, 8, 16, None, 3), llmbench.Stage(2, 64, 128, None, 3),
    ]  # fmt: skip


def test_a_stage_that_only_time_ends_has_no_total():
    config = llmbench.Config(concurrency=[4], duration=30.0)
    assert llmbench.plan_stages(config) == [llmbench.Stage(0, 4, None, 30.0, 0)]
    config.total_requests = 9
    assert llmbench.plan_stages(config) == [llmbench.Stage(0, 4, 9, 30.0, 0)]


def searched(first, most, step, passes):
    """The loads that a search tries, and the highest that passed each time it was tried."""
    search = llmbench.search_maximum(first, most, step)
    tried, failed = [next(search)], set()
    while True:
        passed = passes(tried[-1])
        if not passed:
            failed.add(tried[-1])
        try:
            tried.append(search.send(passed))
        except StopIteration:
            return tried, max((load for load in tried if load not in failed), default=None)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 7, 8, 9, 12, 31, 100, 777, 4095, 4096, 9999])
@pytest.mark.parametrize("first", [1, 4, 100])
def test_the_search_finds_the_highest_number_of_streams(capacity, first):
    tried, found = searched(float(first), 4096.0, 1.0, lambda load: load <= capacity)
    best = min(capacity, 4096)
    assert found <= best
    assert best - found <= max(1, 0.05 * found) and (best >= 40 or found == best)
    assert tried.count(found) == 2 and tried[-1] == found, "the answer is tried a second time"
    assert all(load == int(load) and 1 <= load <= 4096 for load in tried)
    assert len(tried) <= 24


@pytest.mark.parametrize("capacity", [0.02, 0.3, 1.0, 7.77, 130.0, 99999.0])
def test_the_search_finds_the_highest_rate_within_five_percent(capacity):
    tried, found = searched(1.0, 10000.0, 1 / 64, lambda load: load <= capacity)
    best = min(capacity, 10000.0)
    assert found <= best
    assert best - found <= max(1 / 64, 0.05 * found) + 1e-9
    assert tried[-1] == found


def test_a_search_that_nothing_passes_ends_without_an_answer():
    assert searched(8.0, 4096.0, 1.0, lambda _: False) == ([8.0, 4.0, 2.0, 1.0], None)
    assert searched(1.0, 4096.0, 1.0, lambda _: False) == ([1.0], None)


def test_an_answer_that_fails_when_it_is_tried_again_sends_the_search_below_it():
    tries = {}

    def passes(load):
        tries[load] = tries.get(load, 0) + 1
        return load <= 8 and (load < 7 or tries[load] == 1)

    tried, found = searched(1.0, 4096.0, 1.0, passes)
    assert found == 6 and tried[-1] == 6
    assert tried[:9] == [1.0, 2.0, 4.0, 8.0, 16.0, 12.0, 10.0, 9.0, 8.0]


def test_a_probe_is_bounded_in_time_and_requests_unless_the_user_says_how_long():
    config = llmbench.Config(find_max="concurrency")
    assert llmbench.probe_stage(config, 3, 40.0) == llmbench.Stage(3, 40, 200, 30.0, 0)
    assert llmbench.probe_stage(config, 0, 1.0).total == 100
    config.total_requests = 17
    assert llmbench.probe_stage(config, 3, 40.0) == llmbench.Stage(3, 40, 17, None, 0)
    config = llmbench.Config(find_max="rps", rps=[1.0], concurrency=[], duration=5.0, warmup=2)
    assert llmbench.probe_stage(config, 1, 2.5) == llmbench.Stage(1, 0, None, 5.0, 2, 2.5)


# What a run comes to at the worst.


def bounds(prompt=None, **given):
    config = llmbench.Config(timeout=given.pop("timeout", 10.0), **given)
    return llmbench.bounds_of(config, llmbench.plan_stages(config), [prompt or llmbench.Prompt("p", [])])


def test_a_closed_loop_comes_to_its_requests_in_rounds_of_its_time_out():
    assert bounds(concurrency=[4, 8], total_requests=20, warmup=3, max_tokens=7) == (46, 8, 322, 100.0)
    assert bounds(concurrency=[4], duration=30.0) == (None, 4, None, 40.0)
    assert bounds(concurrency=[4], duration=30.0, grace=2.0, ramp=5.0).seconds == 37.0
    assert bounds(concurrency=[4], duration=30.0, max_total_tokens=99).out_tokens == 99
    assert bounds(concurrency=[100], total_requests=3).in_flight == 3


@pytest.mark.parametrize("arrival", ["constant", "poisson", "gamma:0.05"])
@pytest.mark.parametrize("seed", range(6))
def test_never_more_of_an_open_loop_are_in_flight_than_the_plan_says(arrival, seed):
    config = llmbench.Config(rps=[2.0], concurrency=[], duration=60.0, timeout=3.0, arrival=arrival, seed=seed)
    (stage,) = llmbench.plan_stages(config)
    dues = list(itertools.takewhile(lambda due: due < 60.0, llmbench.stage_dues(config, stage, "measure", [])))
    told = llmbench.bounds_of(config, [stage], [llmbench.Prompt("p", [])])
    worst = max(sum(due - 3.0 < other <= due for other in dues) for due in dues)
    assert (told.requests, told.in_flight, told.seconds) == (len(dues), worst, 63.0)


def test_an_open_loop_without_a_duration_lasts_until_its_last_request_times_out():
    told = bounds(rps=[0.5], concurrency=[], total_requests=30, arrival="gamma:0.1", seed=3)
    config = llmbench.Config(rps=[0.5], arrival="gamma:0.1", seed=3)
    last = list(itertools.islice(llmbench.stage_dues(config, llmbench.plan_stages(config)[0], "measure", []), 30))[-1]
    assert told.seconds >= last + 10.0


def test_turns_of_conversations_are_in_the_plan():
    talk = llmbench.Prompt("t", [], None, [[], []])
    told = bounds(talk, rps=[10.0], concurrency=[], duration=3.0, arrival="constant")
    assert (told.requests, told.in_flight) == (90, 30)
    assert bounds(talk, rps=[10.0], concurrency=[], duration=3.0, arrival="constant", turns=2).requests == 60
