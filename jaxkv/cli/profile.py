"""`jaxkv profile`: memory use during a generation, as a report, a map of the pool and plots."""

import argparse
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxkv.cli.compilation_cache import keep_programs
from jaxkv.cli.options import add_common, add_known_model, add_num_pages, add_seed, count
from jaxkv.cli.pool import fitting_config
from jaxkv.cli.prompts import QUESTIONS, SYSTEM_PROMPT, check_prompts, demo_prompts
from jaxkv.compaction import compact
from jaxkv.decode import Decoding, Finish
from jaxkv.generating import generate
from jaxkv.memory.device import DeviceMemory, PeakMemory, device_memory
from jaxkv.memory.page_owners import FREE, LEVELS, SHARED, PageMap, page_map
from jaxkv.memory.pictures import PAGE_SIZES, plot_generation
from jaxkv.memory.profile import MemoryProfile, memory_profile, unused_share
from jaxkv.sampling import Sampling
from jaxkv.units import common_unit, format_bytes

if TYPE_CHECKING:
    from jaxkv.cli.progress import Status
    from jaxkv.models import LoadedModel, Tokenizer  # which needs an extra

HELP = "show memory use during a generation"
_STEPS_A_BLOCK = 4

_profile = jax.jit(memory_profile)
# Not donated: the generation continues with the same cache.
_compact = jax.jit(compact)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `jaxkv profile`."""
    add = command.add_argument
    add_known_model(command)
    text = "text to continue; may be repeated (default: the demo's)"
    add("--prompt", action="append", default=[], metavar="TEXT", help=text)
    add("--num-samples", type=count, default=3, metavar="N", help="continuations per prompt (default: 3)")
    text = "0 is greedy; higher is more random (default: 0.8)"
    add("--temperature", type=float, default=0.8, metavar="T", help=text)
    add_seed(command)
    add_num_pages(command)
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot to .png, .svg, .pdf or another kind of matplotlib's (default: only text)",
    )
    add_common(command)


@dataclass(slots=True)
class _Moment:
    """The cache at one step, and the result of `compact` on it."""

    step: int
    running: int
    profile: MemoryProfile
    before: PageMap
    after: PageMap
    num_moved: int
    device: DeviceMemory


@dataclass(slots=True)
class _Recorder:
    """Records the profiles of a generation, and the step with the most free pages between used ones."""

    model: object
    memory: PeakMemory
    status: "Status"
    steps: list[int] = field(default_factory=list)
    profiles: list[MemoryProfile] = field(default_factory=list)
    moment: _Moment | None = None

    def see(self, state: Decoding) -> None:
        """Called after each block of steps."""
        if not self.steps:
            self.status.say_compiled()
            self.status.next("generating")
        self.memory.sample()
        profile = jax.device_get(_profile(state.cache))
        self.steps.append(int(state.step))
        self.profiles.append(profile)
        if self.moment is None or _interest(profile) > _interest(self.moment.profile):
            self.moment = self._look(state, profile)

    def _look(self, state: Decoding, profile: MemoryProfile) -> _Moment:
        device = device_memory(state.cache, weights=self.model)
        compacted, num_moved = _compact(state.cache)
        return _Moment(
            step=int(state.step),
            running=int(np.sum(np.asarray(state.finish) == Finish.RUNNING)),
            profile=profile,
            before=page_map(state.cache),
            after=page_map(compacted),
            num_moved=int(num_moved),
            device=device,
        )


def _interest(profile: MemoryProfile) -> tuple[int, int]:
    """Highest for many holes among the pages of many sequences."""
    return profile.holes * profile.active_seqs, profile.physical_pages


def run(options: argparse.Namespace) -> int:
    """Prints the memory use of a generation; returns the exit code."""
    check_prompts(options.prompt)
    keep_programs(options.compilation_cache, enabled=not options.no_compilation_cache)
    from jaxkv.cli.progress import Status, load_with_progress

    sampling = Sampling(temperature=options.temperature)
    if options.plot is not None:
        _check_plot(options.plot)
    loaded, tokenizer = load_with_progress(options.model)
    ids = _token_ids(tokenizer, options.prompt)
    config = fitting_config(loaded, ids, options, options.num_samples, options.num_pages)
    with PeakMemory() as memory, Status("compiling") as status:
        recorder = _Recorder(loaded.model, memory, status)
        result = generate(
            loaded.model,
            config,
            ids,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            sampling=sampling,
            stop_tokens=tokenizer.stop_tokens,
            key=jax.random.key(options.seed),
            block=_STEPS_A_BLOCK,
            on_tokens=recorder.see,
        )
    lengths = [
        len(prompt) + len(sample) - 1
        for prompt, samples in zip(ids, result.tokens, strict=True)
        for sample in samples
    ]
    moment = recorder.moment
    if moment is None:
        raise RuntimeError("generate did not call on_tokens")
    print(_text(loaded, moment, lengths, memory, shutil.get_terminal_size().columns))
    if options.plot is not None:
        figure = plot_generation(moment.before, moment.after, recorder.steps, recorder.profiles, lengths)
        figure.savefig(options.plot)
        print(f"\nwrote {options.plot}", file=sys.stderr)
    return 0


def _check_plot(path: Path) -> None:
    """Checks, before minutes of work, that matplotlib can write the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: the name must end with one of .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: no such folder {path.parent}")


def _token_ids(tokenizer: "Tokenizer", prompts: list[str]) -> list[list[int]]:
    """Token ids of the user's prompts, or else of the demo's questions after one system prompt."""
    if prompts:
        return [tokenizer.encode(prompt) for prompt in prompts]
    if tokenizer.chat_template is None:
        return [tokenizer.encode(f"{SYSTEM_PROMPT}\n\n{question}") for question in QUESTIONS]
    return demo_prompts(tokenizer)


def _text(loaded: "LoadedModel", moment: _Moment, lengths: list[int], memory: PeakMemory, width: int) -> str:
    unit = common_unit([moment.device.in_use])
    peak = "at its peak" if memory.is_exact else "at the highest sample"
    ascii_only = not _can_print(FREE + SHARED + LEVELS)
    parts = [
        f"{loaded.name}, step {moment.step}: {moment.running} of {len(lengths)} sequences still running",
        moment.profile.report(),
        moment.device.report(),
        f"the device held {format_bytes(memory.peak, unit)} {peak}",
        f"pages before compaction, {moment.before.holes.sum()} holes",
        moment.before.text(width, ascii_only=ascii_only),
        f"after it, {moment.num_moved} pages moved",
        moment.after.text(width, ascii_only=ascii_only),
        f"waste by page size, {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens",
        "\n".join(f"{size:>4} {unused_share(lengths, size):>6.1%}" for size in PAGE_SIZES),
    ]
    return "\n\n".join(parts)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
