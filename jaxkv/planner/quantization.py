"""How the weights of a repository are stored, from its `config.json` or `hf_quant_config.json`.

A method is one entry of `_METHODS`. What a repository does not say is left to `weights_dtype`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import read_json, shown


class Stored(NamedTuple):
    """How weights are stored.

    Attributes:
      method: as `quant_method`; None is the dtype of the config.
      bits: per quantized weight, including scales and zero points; None if the config does not say.
      parts: which weights are quantized: "all", "linear" (all but embeddings), or "experts".
    """

    method: str | None = None
    bits: float | None = None
    parts: str = "linear"


def quantization(raw: Mapping[str, Any]) -> Stored:
    """How the weights of a config are stored.

    Raises:
      ValueError: for a field that is not of its type, or out of range.
    """
    for field in ("quantization_config", "quantization"):
        options = raw.get(field)
        if options is None:
            continue
        if not isinstance(options, Mapping):
            raise ValueError(f"{field} must be an object, not {shown(options)}")
        method = options.get("quant_method")
        if method is not None and not isinstance(method, str):
            raise ValueError(f"{field}'s quant_method must be a string, not {shown(method)}")
        try:
            if method:
                return _METHODS[method](method, options) if method in _METHODS else Stored(method)
            if "quant_algo" in options:
                return _modelopt("modelopt", options)
            return Stored(field, _mlx_bits(options), "all")
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return Stored()


def beside(folder: Path) -> Mapping[str, Any]:
    """The quantization of `hf_quant_config.json`, which ModelOpt writes beside `config.json`, as its field.

    Raises:
      ValueError: if it cannot be read or is not of its format.
    """
    path = folder / "hf_quant_config.json"
    if not path.is_file():
        return {}
    options = read_json(path).get("quantization")
    if not isinstance(options, Mapping):
        raise ValueError(f"{path}: quantization must be an object, not {shown(options)}")
    return {"quantization_config": {"quant_method": "modelopt", **options}}


def _bits(options: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    bits = Fields(options).integer(*names, default=default)
    if bits > 8:
        raise ValueError(f"{names[0]} must be an integer from 1 to 8, not {shown(bits)}")
    return bits


def _grouped(bits: int, extra: float, group: object) -> float:
    """Bits per weight where each group of weights has `extra` bits of scales and zero points."""
    if group is None or group == -1:
        return float(bits)  # one scale for a row: negligible
    return bits + extra / Fields({"group_size": group}).integer("group_size")


def _fp8(method: str, options: Mapping[str, Any]) -> Stored:
    # One scale of 32 bits for 128 x 128 weights, a row or a matrix: negligible.
    return Stored(method, 8.0, _parts(options, "modules_to_not_convert"))


def _packed(method: str, options: Mapping[str, Any]) -> Stored:
    """AWQ, GPTQ and AutoRound: a scale of 16 bits and a zero point for each group."""
    if options.get("bits", options.get("w_bit")) is None:
        return Stored(method)
    bits = _bits(options, "bits", "w_bit")
    group = options.get("group_size", options.get("q_group_size", 128))
    return Stored(method, _grouped(bits, 16 + bits, group), _parts(options, "modules_to_not_convert"))


def _bitsandbytes(method: str, options: Mapping[str, Any]) -> Stored:
    fields = Fields(options)
    eight, four = (fields.flag(f"load_in_{n}bit", fields.flag(f"_load_in_{n}bit", False)) for n in (8, 4))
    if not eight and not four:
        return Stored()
    # Four bits: the largest value of each 64 in float32, or in 8 bits with float32 for each 256 of those.
    doubled = fields.flag("bnb_4bit_use_double_quant", False)
    bits = 8.0 if eight else 4 + (8 / 64 + 32 / (64 * 256) if doubled else 32 / 64)
    return Stored(method, bits, _parts(options, "llm_int8_skip_modules"))


def _compressed(method: str, options: Mapping[str, Any]) -> Stored:
    """Compressed-tensors; groups of layers that differ in bits leave them unknown."""
    if options.get("format") == "dense":
        return Stored()
    groups = options.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return Stored(method)
    found = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return Stored(method)
        bits = _bits(weights, "num_bits")
        # Scales of NVFP4 and MXFP4 have 8 bits, others 16; asymmetric weights have zero points.
        extra = 8 if bits == 4 and weights.get("type") == "float" else 16
        extra += 0 if Fields(weights).flag("symmetric", True) else bits
        by_group = weights.get("strategy") in ("group", "tensor_group") or weights.get("strategy") is None
        found.add(_grouped(bits, extra, weights.get("group_size") if by_group else None))
    return Stored(method, found.pop() if len(found) == 1 else None, _parts(options, "ignore"))


# ModelOpt's algorithms: bits per weight, bits of a group's scale, and the usual size of a group.
_MODELOPT: dict[str, tuple[int, int, int | None]] = {
    "FP8": (8, 0, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, 0, None),
    "FP8_PB_WO": (8, 0, None),
    "INT8_SQ": (8, 0, None),
    "W8A16": (8, 0, None),
    "NVFP4": (4, 8, 16),
    "NVFP4_AWQ": (4, 8, 16),
    "MXFP4": (4, 8, 32),
    "MXFP8": (8, 8, 32),
    "W4A16_AWQ": (4, 16, 128),
    "W4A8_AWQ": (4, 16, 128),
}


def _modelopt(method: str, options: Mapping[str, Any]) -> Stored:
    name = options.get("quant_algo")
    if name is None:
        return _compressed(method, options) if "config_groups" in options else Stored()
    if not isinstance(name, str):
        raise ValueError(f"quant_algo must be a string, not {shown(name)}")
    if name not in _MODELOPT:
        return Stored(f"{method} {name}")
    bits, extra, usual = _MODELOPT[name]
    group = options.get("group_size") or usual
    named = "exclude_modules" if "exclude_modules" in options else "ignore"
    return Stored(method, _grouped(bits, extra, group if extra else None), _parts(options, named))


def _mxfp4(method: str, options: Mapping[str, Any]) -> Stored:
    return Stored(method, 4.25, "experts")


def _parts(options: Mapping[str, Any], name: str) -> str:
    """Only experts are quantized where attention is left out."""
    left_out = options.get(name) or []
    if not isinstance(left_out, (list, tuple)):
        raise ValueError(f"{name} must be a list, not {shown(left_out)}")
    towers = ("vision", "visual", "audio")
    own = [str(module) for module in left_out if not any(tower in str(module) for tower in towers)]
    return "experts" if any("self_attn" in module for module in own) else "linear"


_METHODS: dict[str, Callable[[str, Mapping[str, Any]], Stored]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "awq": _packed,
    "gptq": _packed,
    "auto-round": _packed,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": _mxfp4,
}


def _mlx_bits(options: Mapping[str, Any]) -> float | None:
    """Bits per weight in MLX's format; None if layers differ or it is another format.

    A group of weights shares a scale and a bias of 16 bits each. The embedding is stored likewise.
    """
    if any(isinstance(value, Mapping) or value is False for value in options.values()):
        return None
    if "bits" not in options or "group_size" not in options or options.get("mode", "affine") != "affine":
        return None
    return _grouped(_bits(options, "bits"), 2 * 16, Fields(options).integer("group_size"))
