"""What a file of this folder says of a model family."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import rotary_settings
from jaxkv.models.tensor_names import GGUF_NAMES, HF_NAMES, TensorNames
from jaxkv.models.tensor_source import TensorSource
from jaxkv.rope import RopePairing


def _nothing(_: object) -> dict[str, Any]:
    return {}


def _as_they_are(source: TensorSource) -> TensorSource:
    return source


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models: what its checkpoints say beyond the sizes that all have.

    Attributes:
      model_types: of a `config.json`.
      options: from the fields of a `config.json`, the arguments of `ModelConfig` that this family sets.
      allowed: values that a field of `config.json` may have; any other is refused. Added to `ALLOWED`.
      rotary: from a `config.json`, the rotary settings of the layers with full attention.
      partial_rotary: the part of a head's features that is rotated if a `config.json` does not say; None
        supports only whole heads.
      absent: values of fields that a `config.json` does not have.
      wrappers: `model_type` of a config whose `text_config` is of this family.
      not_in_wrappers: fields that are refused, unless null, in the `text_config` of a wrapper.
      hf_names: tensor names in a Hugging Face checkpoint.
      hf_source: makes a checkpoint's tensors those that `hf_names` names, where they are stored otherwise.
      quantizations: `quant_method`s that `hf_source` reads.
      hf_pairing: features that a Hugging Face checkpoint rotates as a pair.
      architecture: `general.architecture` of a GGUF file, or None if there is none of its own.
      header: from a GGUF file, the fields of the equivalent `config.json` that only this family has.
      gguf_names: tensor names in a GGUF file.
      gguf_pairing: features that a GGUF file rotates as a pair.
    """

    model_types: tuple[str, ...]
    options: Callable[[Fields], dict[str, Any]] = _nothing
    allowed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    rotary: Callable[[Mapping[str, Any]], Mapping[str, Any]] = rotary_settings
    partial_rotary: float | None = None
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    not_in_wrappers: tuple[str, ...] = ()
    hf_names: TensorNames = HF_NAMES
    hf_source: Callable[[TensorSource], TensorSource] = _as_they_are
    quantizations: tuple[str, ...] = ()
    hf_pairing: RopePairing = "half"
    architecture: str | None = None
    header: Callable[[GGUFFile], dict[str, Any]] = _nothing
    gguf_names: TensorNames = GGUF_NAMES
    gguf_pairing: RopePairing = "half"
