"""gpt-oss: attention sinks, a window in every second layer, experts in MXFP4 or bfloat16."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.gguf_file import GGUFFile
from jaxkv.checkpoints.hf_folder import rotary_settings
from jaxkv.errors import ModelLoadError
from jaxkv.models.experts import Experts
from jaxkv.models.families import qwen3_moe
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import every_nth_full, header_windows, windows
from jaxkv.models.tensor_names import GGUF_NAMES, HF_NAMES
from jaxkv.models.tensor_source import TensorSource

_BLOCKS, _SCALES = "_blocks", "_scales"
# The values of four bits: a sign, two bits of exponent, one of mantissa.
_FP4 = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def options(fields: Fields) -> dict[str, Any]:
    """The sinks, the window, the experts, and the biases."""
    biased = fields.flag("attention_bias", True)
    experts = Experts(
        count=fields.integer("num_local_experts", "num_experts", default=128),
        per_token=fields.integer("num_experts_per_tok", "experts_per_token", default=4),
        intermediate_size=fields.integer("intermediate_size"),
        router_bias=True,
    )
    return windows(fields, every_nth_full(fields, 2)) | {
        "sinks": True,
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": True,
        "activation": "clipped_swiglu",
        "swiglu_limit": fields.number("swiglu_limit", 7.0),
        "swiglu_alpha": fields.number("swiglu_alpha", 1.702),
        "experts": experts,
    }


def rotary(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings; without any, those of the published models."""
    return rotary_settings(raw) or _YARN


class Unpacked:
    """A checkpoint's tensors with those of experts as `HF_NAMES` describes: out features first, gate, up.

    In the file, rows of gate and up alternate; bfloat16 matrices have their in features first. A matrix in
    MXFP4 is two tensors: `_blocks` of 32 values, two to a byte, and `_scales`, an exponent for each block.
    """

    def __init__(self, packed: TensorSource):
        self.path, self._packed = packed.path, packed
        self.shapes = {}
        for name, shape in packed.shapes.items():
            if name.endswith(_BLOCKS):
                self.shapes[name.removesuffix(_BLOCKS)] = self._shape_of_blocks(name)
            elif not name.endswith(_SCALES):
                swapped = _is_matrix(name) and len(shape) == 3
                self.shapes[name] = (shape[0], shape[2], shape[1]) if swapped else shape

    def _shape_of_blocks(self, name: str) -> tuple[int, ...]:
        shape = self._packed.shapes[name]
        scales = name.removesuffix(_BLOCKS) + _SCALES
        if scales not in self._packed.shapes:
            raise ModelLoadError(f"{self.path}: tensor {scales!r} is missing")
        if len(shape) != 4 or shape[3] != 16 or self._packed.shapes[scales] != shape[:3]:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} has shape {shape}, expected 16 bytes for each of its scales, "
                f"{self._packed.shapes[scales]}"
            )
        return shape[0], shape[1], 32 * shape[2]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype; float32 from MXFP4."""
        if name + _BLOCKS in self._packed.shapes:
            blocks, scales = (self._packed.read(name + part) for part in (_BLOCKS, _SCALES))
            for part, tensor in (("blocks", blocks), ("scales", scales)):
                if tensor.dtype != np.uint8:
                    raise ModelLoadError(
                        f"{self.path}: tensor {name!r}: {part} are {tensor.dtype}, not uint8"
                    )
            tensor = dequantized(blocks, scales)
        else:
            tensor = self._packed.read(name)
            tensor = tensor.swapaxes(1, 2) if _is_matrix(name) else tensor
        if ".gate_up_proj" not in name:
            return tensor
        return np.concatenate([tensor[:, 0::2], tensor[:, 1::2]], axis=1)

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor in its file."""
        if name in self._packed.shapes:
            return self._packed.num_bytes(name)
        return sum(self._packed.num_bytes(name + part) for part in (_BLOCKS, _SCALES))


def _is_matrix(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 (OCP Microscaling Formats 1.0) as float32: the low four bits of a byte come first."""
    values = _FP4[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, 32)
    with np.errstate(over="ignore"):
        scaled = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], -1)


def header(file: GGUFFile) -> dict[str, Any]:
    """The experts and the window; llama.cpp knows the limits of the activation, and the layers' order."""
    found = qwen3_moe.header_experts(file, "gpt-oss")
    return found | {"intermediate_size": found["moe_intermediate_size"]} | header_windows(file, "gpt-oss", 2)


FAMILY = Family(
    model_types=("gpt_oss",),
    options=options,
    allowed={"attention_bias": (False, True)},
    rotary=rotary,
    absent={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
    },
    hf_names=dataclasses.replace(
        HF_NAMES,
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        expert_gate_up=("mlp.experts.gate_up_proj",),
        expert_gate_up_bias=("mlp.experts.gate_up_proj_bias",),
        expert_down="mlp.experts.down_proj",
        expert_down_bias="mlp.experts.down_proj_bias",
    ),
    hf_source=Unpacked,
    quantizations=("mxfp4",),
    architecture="gpt-oss",
    header=header,
    gguf_names=dataclasses.replace(GGUF_NAMES, mlp_norm="post_attention_norm.weight"),
)
