"""The command: searches every class, prints what it finds, and writes the table.

Exit status: 0, or 1 where the rule itself gives a wrong result, or 2 for a mistake. The last line of output
is one JSON document.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import jax

from jaxkv.cli.reporting import Parser
from jaxkv.tune.classes import Class, classes
from jaxkv.tune.implementation import HAS_GPU
from jaxkv.tune.search import Found, search
from jaxkv.tune.timing import conditions, publish
from pallas_kernels import use_backend
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import tables

NAME = "python -m jaxkv.tune"


def parser() -> argparse.ArgumentParser:
    """Parses the command line."""
    command = Parser(
        prog=NAME,
        description="Finds the tiles, warps and stages with which paged attention is fastest on this GPU.",
        epilog=f"Programs use the table that the environment variable {tables.VARIABLE} names. Without a GPU "
        "this rehearses: one small class, the kernels interpreted, and no table is written.",
    )
    add = command.add_argument
    text = "begin nothing new after so many minutes (default: 8)"
    add("--minutes", type=_minutes, default=8.0, metavar="M", help=text)
    text = "search classes whose name contains one of these (default: all)"
    add("--only", nargs="+", default=[], metavar="PART", help=text)
    text = "write the table here (default: tuning.toml)"
    add("--out", type=Path, default=Path("tuning.toml"), metavar="FILE", help=text)
    text = "keep the JSON document of a GPU's run in this folder (default: it is only printed)"
    add("--results", type=Path, metavar="FOLDER", help=text)
    return command


def main(arguments: list[str] | None = None) -> int:
    """Searches, prints and writes the table; returns the exit status."""
    command = parser()
    options = command.parse_args(arguments)
    chosen = [some for some in classes() if any(part in some.name for part in options.only or [""])]
    if not chosen:
        command.error(f"no class is called {' or '.join(options.only)}")
    if not options.out.parent.is_dir():
        command.error(f"--out {options.out}: there is no folder {options.out.parent}")
    kind = jax.devices()[0].device_kind
    print(f"on {kind}, JAX {jax.__version__}; a ratio over 1: faster than the best before it")
    if not HAS_GPU:
        print("There is no GPU here: this is a rehearsal, and no table is written.")
    found = search_all(chosen, time.monotonic() + 60 * options.minutes)
    results = {some.name: one for some, one in found.items() if one is not None}
    table = {some.shape: one.values for some, one in found.items() if one is not None and one.values.given}
    if HAS_GPU:
        now = conditions()
        tables.write(options.out, kind, table, f"Found by `{NAME}` on {now['date']}, JAX {now['jax']}.")
        print(f"\n{options.out}: {len(table)} of {len(results)} classes better than the rule")
    wrong = [some.name for some, one in found.items() if one is None]
    document = {
        "on_gpu": HAS_GPU,
        "results": [
            {"class": name, "values": one.values.given, "ratio": one.ratio.as_json()}
            for name, one in results.items()
        ],
        "table": [{**asdict(shape), **values.given} for shape, values in table.items()],
        "wrong": wrong,
    }
    publish("tune", document, options.results if HAS_GPU else None)
    return 1 if wrong else 0


def search_all(chosen: list[Class], deadline: float) -> dict[Class, Found | None]:
    """What `search` finds for each class that there is time for."""
    found, device = {}, Device.current()
    with use_backend("triton", interpret=not HAS_GPU):
        for some in chosen:
            if time.monotonic() > deadline:
                print(f"\n{some.name}: no time left")
            else:
                found[some] = search(some, device, deadline)
    return found


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of minutes")
    return value
