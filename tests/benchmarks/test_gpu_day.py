"""What the day at a GPU would judge, judged beforehand on numbers made up."""

from types import SimpleNamespace

import pytest

from benchmarks import bench_step, check_gpu
from benchmarks.bench_step import Problem, judge_division, judge_memory, planned, problems
from benchmarks.timing import of_one_more
from benchmarks.traces import Division
from jaxkv.memory.device import PeakMemory

LARGEST = Problem(64, 2048)


def division(*, allocate=0.02, append=0.03, unnamed=0.0):
    rest = 1 - allocate - append - unnamed - 0.5
    parts = {"allocate": allocate, "append": append, "attend": 0.5, "rest": rest}
    return Division(parts, 0.0, unnamed)


@pytest.mark.parametrize(
    ("shares", "met"),
    [({}, True), ({"allocate": 0.021}, False), ({"append": 0.031}, False), ({"unnamed": 0.03}, False)],
)
def test_shares_are_held_to_their_bars_and_not_when_much_is_unnamed(monkeypatch, shares, met):
    monkeypatch.setattr(bench_step, "HAS_GPU", True)
    assert judge_division(LARGEST, division(**shares), True, 1.0)["division_met"] is met


def test_smaller_batches_have_no_bars(monkeypatch):
    monkeypatch.setattr(bench_step, "HAS_GPU", True)
    judged = judge_division(Problem(1, 2048), division(allocate=0.2), True, 1.0)
    assert judged["division_met"] and judged["bars"] == {}


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


def test_what_surrounds_the_calls_of_a_program_is_no_part_of_a_call():
    assert of_one_more(lambda calls: 640 + 718 * calls, few=1, many=11) == 718


def test_processes_that_share_the_cases_say_what_each_found(monkeypatch):
    """One of two ends without a word: that is no success."""
    monkeypatch.setattr(check_gpu, "HAS_GPU", True)

    def run(options, name, *arguments, **_):
        first = arguments[-1] == "1/2"
        said = 'so far\n{"failures": []}' if first else "so far"
        return SimpleNamespace(stdout=said, stderr="killed", returncode=0 if first else -9)

    monkeypatch.setattr(check_gpu, "_module", run)
    result = check_gpu.check_conformance(check_gpu.Options(5, "", (), jobs=2))
    assert result["right"] is False and "exit -9: so far killed" in result["note"]


@pytest.mark.parametrize(("said", "right"), [("", None), ("WRONG: {'case': 'a'}\n", False)])
def test_a_process_that_is_late_is_not_right_and_what_it_found_wrong_stays_so(monkeypatch, said, right):
    monkeypatch.setattr(check_gpu, "HAS_GPU", True)
    late = SimpleNamespace(stdout=said, stderr="", returncode=check_gpu.LATE)
    monkeypatch.setattr(check_gpu, "_module", lambda *arguments: late)
    result = check_gpu.check_conformance(check_gpu.Options(5, "", (), jobs=2, limit=9))
    assert result["right"] is right and "2 not finished in 9 s" in result["note"]


def test_a_process_beyond_its_time_is_ended():
    options = check_gpu.Options(5, "", (), limit=0.2)
    assert check_gpu._module(options, "check_gpu", "--help").returncode == check_gpu.LATE


def test_texts_differ_first_where_one_token_does():
    assert check_gpu._first_difference([1, 2, 3], [1, 2, 3]) is None
    assert check_gpu._first_difference([1, 2, 3], [1, 5, 4]) == 1


def test_what_is_not_run_is_no_success_and_no_failure(monkeypatch, capsys):
    assert check_gpu.main(["--only", "memcheck", "racecheck", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("-: not run: no GPU") == 2


def test_a_wrong_part_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setitem(check_gpu.PARTS, "text", lambda options: check_gpu._said(False, "made up"))
    assert check_gpu.main(["--only", "text", "--seed", "3"]) == 1
    assert "WRONG: made up" in capsys.readouterr().out
