"""What `bench_step` judges on a GPU, with figures made up."""

import pytest

from benchmarks import bench_step
from benchmarks.bench_step import Problem, judge_division, judge_memory, planned, problems
from benchmarks.traces import Division
from jaxkv.memory.device import PeakMemory
from jaxkv.tune.timing import of_one_more

LARGEST = Problem(64, 2048)


def division(*, allocate=0.02, append=0.03, unnamed=0.0):
    rest = 1 - allocate - append - unnamed - 0.5
    parts = {"allocate": allocate, "append": append, "attend": 0.5, "rest": rest}
    return Division(parts, 0.0, unnamed)


@pytest.mark.parametrize(
    ("shares", "met"),
    [({}, True), ({"allocate": 0.021}, False), ({"append": 0.031}, False), ({"unnamed": 0.03}, False)],
)
def test_shares_must_meet_their_targets_and_none_does_when_much_is_unnamed(monkeypatch, shares, met):
    monkeypatch.setattr(bench_step, "HAS_GPU", True)
    assert judge_division(LARGEST, division(**shares), True, 1.0)["division_met"] is met


def test_smaller_batches_have_no_targets(monkeypatch):
    monkeypatch.setattr(bench_step, "HAS_GPU", True)
    judged = judge_division(Problem(1, 2048), division(allocate=0.2), True, 1.0)
    assert judged["division_met"] and judged["targets"] == {}


@pytest.mark.parametrize(
    ("peak", "is_exact", "met"),
    [(102, True, True), (103, True, False), (97, True, False), (100, False, False)],
)
def test_a_peak_counts_only_where_it_rose(monkeypatch, peak, is_exact, met):
    monkeypatch.setattr(bench_step, "HAS_GPU", True)
    memory = PeakMemory(peak=peak, is_exact=is_exact)
    assert judge_memory(memory, {"planner": 100})["memory_met"] is met


def test_problems_come_in_the_order_of_their_memory(monkeypatch):
    for on_gpu in (False, True):
        monkeypatch.setattr(bench_step, "HAS_GPU", on_gpu)
        reserved = [planned(problem).kv.reserved for problem in problems()]
        assert reserved == sorted(reserved) and len(set(reserved)) == len(reserved)


def test_the_time_of_a_call_leaves_out_what_surrounds_the_calls():
    assert of_one_more(lambda calls: 640 + 718 * calls, few=1, many=11) == 718
