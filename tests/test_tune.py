"""`python -m jaxkv.tune`: what the search takes, and what the command says."""

import argparse
import json
import re

import pytest

from jaxkv.cli.reporting import exit_code
from jaxkv.tune import classes, command, search
from jaxkv.tune.classes import Class
from jaxkv.tune.problems import decode, uniform
from jaxkv.tune.timing import Sample
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton.tables import Values

H100 = Device("sm_90", 132, "NVIDIA H100 80GB HBM3")
SOME = Class((decode(uniform(2, 40), heads=(4, 2, 16)),))


def test_the_search_takes_what_is_faster_beyond_the_spread(monkeypatch):
    """With a clock that likes tiles of 64 keys, and warps by fours."""

    def seconds(candidate):
        return abs(candidate.key_tile - 64) + 10 * abs(candidate.num_warps - 4) + 100

    class Clock(search.Trials):
        def __init__(self, some):
            pass

        def prepare(self, candidate):
            return "too much shared memory" if candidate.num_stages == 6 else [candidate]

        def compare(self, ready):
            return {one: Sample((seconds(one),) * 3) for one in ready}

    monkeypatch.setattr(search, "Trials", Clock)
    found = search.search(SOME, H100, deadline=float("inf"))
    assert found is not None and found.values == Values(key_tile=64)
    assert found.ratio.median > 1.4


def test_every_class_of_the_search_is_a_row_of_its_own(monkeypatch):
    monkeypatch.setattr(classes, "HAS_GPU", True)
    found = classes.classes()
    assert len({some.shape for some in found}) == len(found)
    for some in found:
        assert {Class((problem,)).shape for problem in some.problems} == {some.shape}


def test_every_option_says_what_it_does_and_what_holds_without_it():
    for action in command.parser()._actions:
        if not isinstance(action, argparse._HelpAction):
            said = re.search(r".{5,} \(default: (.+)\)", action.help or "")
            assert said and said[1].startswith({"minutes": "8", "out": "tuning.toml"}.get(action.dest, ""))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--minutes", "0"], "argument --minutes: '0' is not a positive number of minutes"),
        (["--only", "nothing"], "no class is called nothing"),
        (["--out", "not/there.toml"], "--out not/there.toml: there is no folder not"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"python -m jaxkv.tune: error: {says} (see python -m jaxkv.tune --help)\n"
    )


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path):
    """With a search that finds something at once."""
    found = search.Found(Values(key_tile=64), Sample((1.5, 1.5)))
    monkeypatch.setattr(command, "search", lambda *_: found)
    table = tmp_path / "tuning.toml"
    assert command.main(["--out", str(table), "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "There is no GPU here: this is a rehearsal, and no table is written." in out
    (row,) = json.loads(out.splitlines()[-1])["table"]
    assert row["key_tile"] == 64 and not list(tmp_path.iterdir())


def test_a_rule_that_is_wrong_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(command, "search", lambda *_: None)
    assert exit_code(command.NAME, lambda: command.main([])) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["wrong"]) == 1
