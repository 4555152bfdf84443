"""`jaxkv serve`: answers requests that come as JSON lines, many at a time; events are JSON lines too."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jaxkv import sizing
from jaxkv.cli.compilation_cache import keep_programs
from jaxkv.cli.options import (
    EPILOG,
    KV_DTYPES,
    add_chat,
    add_common,
    add_metrics_port,
    add_model,
    count,
)
from jaxkv.cli.request_lines import FIELDS, MOST_STOP_TOKENS, Lines, open_requests
from jaxkv.cli.session import Observers, Session
from jaxkv.config import CacheConfig
from jaxkv.errors import SequenceTooLongError
from jaxkv.memory.device import device_memory
from jaxkv.memory.telemetry import Telemetry
from jaxkv.serving import PromptLookup, Request, ServingConfig, ServingMetrics, ServingState, serve

if TYPE_CHECKING:
    from jaxkv.models import LoadedModel, Tokenizer  # which need an extra

HELP = "answer requests that come as JSON lines"
_MOST_CONTEXT = 2048
# Of a pool that nobody sized, where the device does not say what memory it has.
_MOST_BYTES = 4 * 2**30


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `jaxkv serve`."""
    command.description = (
        'A request is a line like {"id": 1, "prompt": "Once"}. Its fields: '
        f"{', '.join(FIELDS)}; exactly one of the first three. An event is a line with id, sample, text, "
        "tokens and finish. Text and tokens are what is new; finish is null while the sample goes on, then "
        "stop, length or out_of_pages. A request that is refused has an event with id and error; one without "
        "an id is named by its line. The exit status is 0 though requests were refused."
    )
    command.epilog = EPILOG
    add = command.add_argument
    add_model(command)
    text = "JSON lines, in UTF-8; - is standard input, read as lines come (required)"
    add("--requests", required=True, metavar="FILE", help=text)
    add("--output", type=Path, metavar="FILE", help="where events go (default: standard output)")
    add("--slots", type=count, default=8, metavar="N", help="samples that run at once (default: 8)")
    text = f"most tokens of a sample and its prompt (default: the model's context, at most {_MOST_CONTEXT})"
    add("--max-tokens", type=count, metavar="N", help=text)
    text = (
        "pages in the pool (default: what --slots samples of --max-tokens need, within half of the device's "
        "free memory, or 4 GiB on a CPU)"
    )
    add("--num-pages", type=count, metavar="N", help=text)
    text = "most tokens of a step, prompts and new ones (default: 256, or what --slots need if that is more)"
    add("--token-budget", type=count, metavar="N", help=text)
    text = "share the pages of prompts that begin alike (default: on)"
    add("--prefix-cache", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "propose TOKENS that followed the last NGRAM tokens earlier, like 3:4 (default: one token a step)"
    add("--speculate", type=_speculation, metavar="NGRAM:TOKENS", help=text)
    text = "add log_probs, the log-probability of each token, to events (default: off)"
    add("--log-probs", action="store_true", help=text)
    add_chat(command)
    add_metrics_port(command)
    add_common(command, new_tokens="most new tokens of a sample whose request does not say")


def run(options: argparse.Namespace) -> int:
    """Serves until the last request is answered; returns the exit code, 130 after Ctrl-C."""
    if not options.model:
        raise ValueError("--model is empty")
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    with ExitStack() as stack:
        lines = stack.enter_context(closing(Lines(open_requests(options.requests))))
        output = stack.enter_context(_output(options))
        observers = stack.enter_context(_metrics(options.metrics_port))
        keep_programs(options.compilation_cache, enabled=not options.no_compilation_cache)
        return _serve(options, lines, output, observers)


def _serve(options: argparse.Namespace, lines: Lines, output: TextIO, observers: Observers) -> int:
    from jaxkv.cli.progress import Status, load_with_progress

    loaded, tokenizer = load_with_progress(options.model)
    config = serving_config(loaded, tokenizer, options)
    print(_sizes(config), file=sys.stderr, flush=True)
    session = Session(lines, output, tokenizer, config, options, observers)
    with Status("compiling") as status:
        # Every program is compiled before the clock starts.
        for _ in serve(loaded.model, config, [Request(tokens=[0], max_new_tokens=1)]):
            pass
        status.say_compiled("compiled")
        status.next("waiting for requests")
        if output is sys.stdout and sys.stdout.isatty():
            status.stop()
        session.status = status
        with _ctrl_c(session):
            for event in serve(
                loaded.model, config, session.requests(), tokenizer=tokenizer, on_state=session.on_state
            ):
                session.answer(event)
    print(session.figures(), file=sys.stderr)
    if not session.interrupted:
        return 0
    print(f"jaxkv: stopped; requests left: {len(session.open) + lines.waiting}", file=sys.stderr)
    return 130


def serving_config(
    loaded: "LoadedModel", tokenizer: "Tokenizer", options: argparse.Namespace
) -> ServingConfig:
    """Sizes of the server.

    Raises:
      SequenceTooLongError: for more tokens than the model was trained on.
      ValueError: for other sizes that do not fit each other.
    """
    context = loaded.config.max_context
    tokens = min(context, _MOST_CONTEXT) if options.max_tokens is None else options.max_tokens
    if tokens > context:
        raise SequenceTooLongError(f"--max-tokens {tokens}: {loaded.name} was trained on {context}")
    return ServingConfig(
        _cache_config(loaded, tokens, options),
        max_requests=max(64, 2 * options.slots),
        max_tokens=tokens,
        token_budget=options.token_budget,
        max_stop_tokens=len(tokenizer.stop_tokens) + MOST_STOP_TOKENS,
        log_probs=options.log_probs,
        speculate=options.speculate,
    )


def _cache_config(loaded: "LoadedModel", tokens: int, options: argparse.Namespace) -> CacheConfig:
    dtype, quantization = KV_DTYPES.get(options.kv_dtype, (None, None))
    one = loaded.model.cache_config(
        num_pages=1,
        max_pages_per_seq=1,
        page_size=options.page_size,
        max_seqs=options.slots,
        quantization=quantization,
        prefix_cache=options.prefix_cache,
        **({} if dtype is None else {"dtype": dtype}),
    )
    pages = one.pages_for(tokens)
    row = replace(one, num_pages=pages, max_pages_per_seq=pages)
    if options.num_pages is not None:
        return replace(row, num_pages=options.num_pages, max_pages_per_seq=min(pages, options.num_pages))
    least, most = (sizing.pages_for_seqs(row, tokens, seqs) for seqs in (1, options.slots))
    # Each page takes its bytes, a refcount and an entry of the free stack.
    return replace(row, num_pages=max(least, min(most, _free_bytes() // (row.page_bytes + 8))))


def _free_bytes() -> int:
    memory = device_memory()
    return _MOST_BYTES if memory.limit is None else (memory.limit - memory.in_use) // 2


def _sizes(config: ServingConfig) -> str:
    cache = config.cache
    most = min(config.max_tokens, cache.max_tokens_per_seq)
    return (
        f"{cache.max_seqs} slots, {cache.num_pages} pages of {cache.page_size} tokens "
        f"({cache.estimated_memory()}), up to {most} tokens a sample"
        + (f" (--max-tokens {config.max_tokens} needs more pages)" if most < config.max_tokens else "")
    )


@contextmanager
def _metrics(port: int | None) -> Iterator[Observers]:
    """Serves metrics of the server and of its cache over HTTP, if there is a port."""
    if port is None:
        yield Observers()
        return
    telemetry = Telemetry()
    metrics = ServingMetrics(registry=telemetry.registry)

    def observe(state: ServingState) -> None:
        metrics.observe(state)
        telemetry.observe(state.cache)

    with telemetry.serve(port) as server:
        print(f"metrics: {server.url}", file=sys.stderr, flush=True)
        yield Observers(observe, metrics.see)
        telemetry.flush()


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[TextIO]:
    """Where events go."""
    if options.output is None:
        yield sys.stdout
        return
    path, requests = options.output, options.requests
    if path.exists() and os.path.exists(requests) and path.samefile(requests):
        raise ValueError(f"--output {path} is the file of requests")
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield file


@contextmanager
def _ctrl_c(session: Session) -> Iterator[None]:
    """Ctrl-C ends the session after its block of steps; a second one ends it at once."""

    def stop(signum: int, frame: object) -> None:
        if session.interrupted:
            raise KeyboardInterrupt
        session.interrupted = True

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _speculation(text: str) -> PromptLookup:
    try:
        ngram, tokens = map(int, text.split(":"))
        return PromptLookup(ngram, tokens)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NGRAM:TOKENS, like 3:4") from None
