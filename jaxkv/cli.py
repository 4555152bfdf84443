"""The command line: `jaxkv generate`, `jaxkv profile`, `jaxkv demo` and `jaxkv plan`.

A user's mistake is one line on standard error and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxkv.invariants import JaxKVError
from jaxkv.planner.command import add_arguments as add_plan_arguments
from jaxkv.planner.command import run as run_plan

# `dtype` and `quantization` of the cache; no dtype means the model's.
KV_DTYPES = {
    "f32": ("float32", None),
    "bf16": ("bfloat16", None),
    "f16": ("float16", None),
    "int8": (None, "int8"),
    "fp8": (None, "fp8"),
    "int4": (None, "int4"),
}
# Which optional part brings a package; the others come with the models.
_EXTRAS = {"matplotlib": "plot", "prometheus_client": "metrics"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, JaxKVError, OSError) as error:
        print(f"jaxkv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "models")
        print(f"jaxkv: error: {error.name} is missing; pip install 'jaxkv[{extra}]'", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"jaxkv: error: the device refused: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njaxkv: stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxkv", description="A paged KV cache for JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("generate", help="write text with a model")
    command.set_defaults(run=_run_generate)
    command.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_NAME",
        help="a GGUF file, a Hugging Face folder, or a known name",
    )
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    command.add_argument("--prompts-file", type=Path, metavar="FILE", help="UTF-8, one prompt a line")
    command.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    command.add_argument("--system", metavar="TEXT", help="system prompt; with --chat")
    command.add_argument(
        "--num-samples", type=_count, default=1, metavar="N", help="continuations of each prompt"
    )
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--seed", type=_seed, default=0, metavar="N")
    command.add_argument("--num-pages", type=_count, metavar="N", help="pages in the pool (default: enough)")
    command.add_argument(
        "--policy",
        metavar="NAME:TOKENS[,...]",
        help="bound each sequence's memory: sliding-window:1024,sinks=4 or heavy-hitter:512,recent=256, lru, "
        "semantic-merge, prompt-compress",
    )
    command.add_argument(
        "--metrics-port", type=_port, metavar="N", help="serve metrics for Prometheus; 0 is any free port"
    )
    _add_common(command)

    command = commands.add_parser("profile", help="where memory goes while a model writes")
    command.set_defaults(run=_run_profile)
    command.add_argument("--model", default="smollm2-135m", metavar="PATH_OR_NAME")
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be repeated (default: the demo's)"
    )
    command.add_argument("--num-samples", type=_count, default=3, metavar="N", help="of each prompt")
    command.add_argument("--temperature", type=float, default=0.8, metavar="T")
    command.add_argument("--seed", type=_seed, default=0, metavar="N")
    command.add_argument("--num-pages", type=_count, metavar="N", help="pages in the pool (default: enough)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    _add_common(command)

    command = commands.add_parser("demo", help="four prompts behind one shared system prompt, checked")
    command.set_defaults(run=_run_demo)
    command.add_argument("--model", default="smollm2-135m", metavar="PATH_OR_NAME")
    _add_common(command)

    command = commands.add_parser("plan", help="does a model fit a device, how many sequences, how long?")
    command.set_defaults(run=run_plan)
    add_plan_arguments(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=_count, default=64, metavar="N")
    command.add_argument("--page-size", type=_count, default=16, metavar="N", help="token places a page")
    command.add_argument(
        "--kv-dtype", choices=KV_DTYPES, help="how K and V are kept (default: as the model's)"
    )


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer below {2**30}")
    return value


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {2**32 - 1}")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to {2**16 - 1}")
    return int(text)


def _run_generate(options: argparse.Namespace) -> int:
    from jaxkv.terminal import run_generate

    return run_generate(options, _read_prompts(options))


def _run_profile(options: argparse.Namespace) -> int:
    from jaxkv.terminal_profile import run_profile

    _check_prompts(options.prompt)
    return run_profile(options)


def _run_demo(options: argparse.Namespace) -> int:
    from jaxkv.terminal import run_demo

    return run_demo(options)


def _read_prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_bytes().decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompts_file}: is not UTF-8 at byte {error.start}") from None
        except ValueError as error:
            raise ValueError(f"--prompts-file {str(options.prompts_file)!r}: {error}") from None
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE with at least one line")
    if not options.model:
        raise ValueError("--model is empty")
    _check_prompts(prompts)
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    return prompts


def _check_prompts(prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty")
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"prompt {number} is not UTF-8")


def entry_point() -> None:
    """What the installed `jaxkv` command calls."""
    code = main()
    sys.stdout.flush()
    # Threads of the runtime may still be in a computation that Ctrl-C left behind.
    os._exit(code) if code == 130 else sys.exit(code)


if __name__ == "__main__":
    entry_point()
