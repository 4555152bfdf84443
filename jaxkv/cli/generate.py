"""`jaxkv generate`: prints texts on standard output, figures on standard error."""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from jaxkv.cli.compilation_cache import keep_programs
from jaxkv.cli.options import (
    EPILOG,
    add_chat,
    add_common,
    add_metrics_port,
    add_model,
    add_num_pages,
    add_seed,
    count,
)
from jaxkv.cli.pool import fitting_config
from jaxkv.cli.prompts import check_stop, read_prompts, token_ids
from jaxkv.cli.report import cut, found, pages, speed
from jaxkv.decode import Decoding
from jaxkv.generating import generate
from jaxkv.generation import Generation
from jaxkv.memory.telemetry import Telemetry
from jaxkv.policies.parse import parse_policy
from jaxkv.rope import Rope
from jaxkv.sampling import Sampling

HELP = "generate text with a model"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `jaxkv generate`."""
    command.epilog = EPILOG
    add = command.add_argument
    add_model(command)
    text = "text to continue; may be repeated (default: only those of --prompts-file)"
    add("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = "UTF-8, one prompt per line; blank lines are skipped (default: none)"
    add("--prompts-file", type=Path, metavar="FILE", help=text)
    add_chat(command)
    text = "end a text before this string; may be repeated (default: none)"
    add("--stop", action="append", default=[], metavar="TEXT", help=text)
    add("--num-samples", type=count, default=1, metavar="N", help="continuations per prompt (default: 1)")
    text = "0 is greedy; higher is more random (default: 0)"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    add("--top-k", type=int, metavar="K", help="draw from the K most probable tokens (default: from all)")
    text = "draw from the most probable tokens that together have this probability (default: from all)"
    add("--top-p", type=float, metavar="P", help=text)
    add_seed(command)
    add_num_pages(command)
    add(
        "--policy",
        metavar="NAME:TOKENS[,...]",
        help="bound each sequence's memory: sliding-window:1024,sinks=4 or heavy-hitter:512,recent=256, lru, "
        "semantic-merge, prompt-compress (default: keep everything)",
    )
    add_metrics_port(command)
    add_common(command, least=0)


def run(options: argparse.Namespace) -> int:
    """Writes the continuations of all prompts; returns the exit code."""
    prompts = read_prompts(options)
    check_stop(options.stop)
    keep_programs(options.compilation_cache, enabled=not options.no_compilation_cache)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.policy is not None:
        # Checks it before the weights are read.
        parse_policy(options.policy, rope=Rope((1.0,)))
    with _metrics(options.metrics_port) as observe:
        return _generate(options, prompts, sampling, observe)


def _generate(options: argparse.Namespace, prompts: list[str], sampling: Sampling, observe) -> int:
    from jaxkv.cli.progress import STEPS_A_BLOCK, Watch, load_with_progress

    loaded, tokenizer = load_with_progress(options.model)
    ids = token_ids(tokenizer, prompts, options)
    policy = parse_policy(options.policy, rope=loaded.config.rope) if options.policy is not None else None
    config = fitting_config(loaded, ids, options, options.num_samples, options.num_pages, policy)
    alone = len(prompts) * options.num_samples == 1

    def see(state: Decoding) -> np.ndarray:
        observe(state.cache)
        return watch.see(state)

    with Watch(tokenizer, options.max_new_tokens, stream=alone, stop=options.stop) as watch:
        result = generate(
            loaded.model,
            config,
            ids,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            sampling=sampling,
            stop_tokens=tokenizer.stop_tokens,
            key=jax.random.key(options.seed),
            block=STEPS_A_BLOCK,
            warm_up=True,
            on_tokens=see,
            policy=policy,
        )
    if not alone:
        for number, text in enumerate(watch.texts.texts):
            print(f"\n> {prompts[number // options.num_samples]}\n{text.strip()}")
    print(f"\n{speed(result)}\n{pages(config, result)}", file=sys.stderr)
    if ended := cut(result, options.max_new_tokens):
        print(ended, file=sys.stderr)
    if result.found_tokens:
        print(found(result), file=sys.stderr)
    if policy is not None:
        print(_evicted(result, str(options.policy)), file=sys.stderr)
    return 0


@contextmanager
def _metrics(port: int | None):
    """Yields a function that observes a cache; serves the metrics over HTTP if there is a port."""
    if port is None:
        yield lambda cache: None
        return
    telemetry = Telemetry()
    with telemetry.serve(port) as server:
        print(f"metrics: {server.url}", file=sys.stderr, flush=True)
        yield telemetry.observe
        telemetry.flush()


def _evicted(result: Generation, policy: str) -> str:
    stats = result.cache.stats
    times, tokens = int(stats.evictions), int(stats.evicted_tokens)
    return f"{policy}: dropped {tokens} tokens in {times} eviction{'s' * (times != 1)}"
