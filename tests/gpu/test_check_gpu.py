"""What `check_gpu` concludes from its processes, without a GPU."""

from types import SimpleNamespace

import pytest

from tests.gpu import check_gpu, running


def test_processes_that_share_the_cases_say_what_each_found(monkeypatch):
    """One of two ends without a result: that is no success."""
    monkeypatch.setattr(check_gpu, "HAS_GPU", True)

    def run(options, name, *arguments, **_):
        first = arguments[-1] == "1/2"
        said = 'so far\n{"failures": []}' if first else "so far"
        return SimpleNamespace(stdout=said, stderr="killed", returncode=0 if first else -9)

    monkeypatch.setattr(check_gpu, "module", run)
    result = check_gpu.check_conformance(running.Options(5, "", (), jobs=2))
    assert result["right"] is False and "exit -9: so far killed" in result["note"]


@pytest.mark.parametrize(("said", "right"), [("", None), ("WRONG: {'case': 'a'}\n", False)])
def test_a_process_that_is_late_is_not_right_and_what_it_found_wrong_stays_so(monkeypatch, said, right):
    monkeypatch.setattr(check_gpu, "HAS_GPU", True)
    late = SimpleNamespace(stdout=said, stderr="", returncode=running.LATE)
    monkeypatch.setattr(check_gpu, "module", lambda *arguments: late)
    result = check_gpu.check_conformance(running.Options(5, "", (), jobs=2, limit=9))
    assert result["right"] is right and "2 not finished in 9 s" in result["note"]


def test_a_process_beyond_its_time_is_ended():
    options = running.Options(5, "", (), limit=0.2)
    assert running.module(options, "check_gpu", "--help").returncode == running.LATE


def test_texts_differ_first_where_one_token_does():
    assert check_gpu._first_difference([1, 2, 3], [1, 2, 3]) is None
    assert check_gpu._first_difference([1, 2, 3], [1, 5, 4]) == 1


def test_what_is_not_run_is_no_success_and_no_failure(monkeypatch, capsys):
    assert check_gpu.main(["--only", "memcheck", "racecheck", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("-: not run: no GPU") == 2


def test_a_wrong_part_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setitem(check_gpu.PARTS, "text", lambda options: running.outcome(False, "made up"))
    assert check_gpu.main(["--only", "text", "--seed", "3"]) == 1
    assert "WRONG: made up" in capsys.readouterr().out
