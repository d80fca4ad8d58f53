"""How a run is split: every stream and every request belongs to exactly one part, without the parts talking."""

from __future__ import annotations

import itertools

import pytest

import llmbench

SPLITS = list(itertools.product(range(1, 6), range(1, 6)))  # hosts, processes on each


def parts_of(hosts, processes):
    return [llmbench.Part(k, hosts, p, processes) for k in range(hosts) for p in range(processes)]


@pytest.mark.parametrize("hosts,processes", SPLITS)
def test_every_request_belongs_to_exactly_one_part(hosts, processes):
    for first, last in [(0, 0), (0, 1), (0, 60), (7, 61), (13, 14)]:
        taken = [index for part in parts_of(hosts, processes) for index in llmbench.indices_of(part, first, last)]
        assert sorted(taken) == list(range(first, last))


@pytest.mark.parametrize("hosts,processes", SPLITS)
def test_a_part_takes_the_requests_that_the_rule_gives_it(hosts, processes):
    for part in parts_of(hosts, processes):
        expected = [i for i in range(90) if i % hosts == part.host and (i // hosts) % processes == part.process]
        assert list(llmbench.indices_of(part, 0, 90)) == expected


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
    endless = llmbench.indices_of(llmbench.Part(1, 2, 0, 1), 3, None)
    assert list(itertools.islice(endless, 4)) == [3, 5, 7, 9]


def test_one_part_is_the_whole():
    assert list(llmbench.indices_of(llmbench.Part(), 2, 6)) == [2, 3, 4, 5]
    assert llmbench.streams_of(llmbench.Part(), 9) == 9


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
