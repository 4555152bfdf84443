"""Is any config read otherwise than `transformers` reads it, without a word?

    python -m benchmarks.compare_configs [--count N] [--seed N] [--start N]

Takes the configs of the small checkpoints of every family, changes one to four fields of each (another value,
a field of another family, one left out), writes a checkpoint of random weights with `transformers` and that
config, and compares the logits of 24 tokens in float32. Each config ends in one of:

  equal        every logit within 1e-4 of the largest.
  refused      by jaxkv, in one line.
  no original  `transformers` cannot build or run it, or its logits are not finite.
  different    what must not be: other logits, without a word.
  traceback    what must not be: another error than a refusal.

Exit status: 1 where there is one of the last two. The last line of output is one JSON document.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.config_changes import changed_configs
from benchmarks.publishing import publish
from jaxkv.models import ModelConfig, dense_logits, load

LENGTH, CLOSE, LONGEST_MESSAGE = 24, 1e-4, 400
EQUAL, REFUSED, NO_ORIGINAL, DIFFERENT, TRACEBACK = (
    "equal", "refused", "no original", "different", "traceback",
)  # fmt: skip


def original(folder: Path, config: dict, tokens: np.ndarray) -> np.ndarray:
    """Writes a checkpoint of random weights; returns the logits that `transformers` gives.

    Raises:
      Exception: whatever `transformers` raises for a config.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    path = folder / "config.json"
    path.write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(folder)
    nested = "text_config" in config
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    model = auto.from_config(read, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Wide layers get smaller weights: large scores would differ by rounding alone.
            spread = 0.3 if weight.ndim == 1 else 1.5 / weight.shape[-1] ** 0.5
            weight.normal_(1.0 if weight.ndim == 1 and "norm" in name else 0.0, spread)
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    model.save_pretrained(folder)
    path.write_text(json.dumps(config))
    return logits


def verdict(config: dict, tokens: np.ndarray) -> tuple[str, str]:
    """How a config ends, and a word about it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            ModelConfig.from_hf(config)
        except ValueError as error:
            one_line = str(error) and "\n" not in str(error) and len(str(error)) <= LONGEST_MESSAGE
            return (REFUSED, str(error)) if one_line else (TRACEBACK, repr(error))
        except Exception as error:
            return TRACEBACK, repr(error)
        try:
            wanted = original(folder, config, tokens)
        except Exception as error:
            return NO_ORIGINAL, f"{type(error).__name__}: {error}"[:200]
        try:
            # `transformers` takes the rotary settings of the text's length.
            loaded = load(folder, max_context=LENGTH)
            got = np.asarray(dense_logits(loaded.model, jnp.asarray(tokens), jnp.full(len(tokens), LENGTH)))
        except ValueError as error:
            return (REFUSED, str(error)) if "\n" not in str(error) else (TRACEBACK, repr(error))
        except Exception as error:
            return TRACEBACK, repr(error)
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    return (EQUAL if error <= CLOSE else DIFFERENT), f"{error:.2e}"


def main() -> int:
    """Prints every config that is wrong, and the counts; returns the exit status."""
    parser = argparse.ArgumentParser(description="Configs with changed fields, beside transformers.")
    parser.add_argument("--count", type=int, default=10_000, help="configs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="configs to skip first (default: %(default)s)")
    options = parser.parse_args()
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokens = np.random.default_rng(0).integers(1, 96, (1, LENGTH), dtype=np.int32)
    counts, families, largest, began = Counter(), {}, 0.0, time.monotonic()
    drawn = islice(changed_configs(options.seed), options.start, options.start + options.count)
    for at, (name, config) in enumerate(drawn, options.start):
        torch.manual_seed(at)
        # One primitive at a time: each compiles once for all configs, where a whole model would for each.
        with jax.disable_jit():
            end, word = verdict(config, tokens)
        counts[end] += 1
        families.setdefault(name, Counter())[end] += 1
        if end == EQUAL:
            largest = max(largest, float(word))
        if end in (DIFFERENT, TRACEBACK):
            print(f"{end} {at} {name}: {word}\n    {json.dumps(config)}", flush=True)
        if at % 250 == 249:
            print(f"{at + 1}: {dict(counts)} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{'family':<16}" + "".join(f"{end:>13}" for end in (EQUAL, REFUSED, NO_ORIGINAL, DIFFERENT)))
    for name, ends in sorted(families.items()):
        print(f"{name:<16}" + "".join(f"{ends[end]:>13}" for end in (EQUAL, REFUSED, NO_ORIGINAL, DIFFERENT)))
    print(f"\n{dict(counts)}; largest error of those called equal {largest:.1e}")
    results = {"count": options.count, "seed": options.seed, "start": options.start, "ends": dict(counts)}
    results |= {
        "largest_error": largest,
        "families": {name: dict(families[name]) for name in sorted(families)},
    }
    publish("configs", results, keep=options.count >= 10_000)
    return 1 if counts[DIFFERENT] or counts[TRACEBACK] else 0


if __name__ == "__main__":
    sys.exit(main())
