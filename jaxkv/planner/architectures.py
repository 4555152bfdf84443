"""Architectures by `model_type`: their weights, windows and what they have beside layers.

An architecture that is not in `ARCHITECTURES` is refused, since a guess may be wrong by gigabytes.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.planner import weights
from jaxkv.planner.weights import Layer, Sizes


class Architecture(NamedTuple):
    """One `model_type`.

    Attributes:
      layers: weights of every layer.
      windows: window of every layer if the config has no `layer_types`; None is all tokens.
      tied: whether the output projection is the embedding table, if the config does not say.
      positions: whether positions have a table of weights.
      final_norm: weights per feature of the norm before the output projection.
      latent: whether a token has one latent vector instead of K and V (MLA).
      indexed: whether a token has a key of an indexer too, beside the latent vector.
      sinks: whether heads have a learned attention sink.
      extra_positions: rows of the table of positions beyond the context.
      head_bias: whether the output projection has a bias.
      state: elements of the states of fixed size of one sequence, in layers without K and V.
    """

    layers: Callable[[Fields, Sizes], list[Layer]]
    windows: Callable[[Fields, int], list[int | None]]
    tied: bool = False
    positions: bool = False
    final_norm: int = 1
    latent: bool = False
    indexed: bool = False
    sinks: bool = False
    extra_positions: int = 0
    head_bias: bool = False
    state: Callable[[Fields, int], int] | None = None


def _no_window(fields: Fields, layers: int) -> list[int | None]:
    return [None] * layers


def _every_layer(fields: Fields, layers: int) -> list[int | None]:
    return [fields.optional("sliding_window")] * layers


def _late_layers(fields: Fields, layers: int) -> list[int | None]:
    if not fields.flag("use_sliding_window", False):
        return [None] * layers
    first, window = fields.integer("max_window_layers", least=0), fields.optional("sliding_window")
    return [window if layer >= first else None for layer in range(layers)]


def _all_but_every(pattern: int):
    """A window in all layers except every `pattern`-th; the config may give another pattern."""

    def windows(fields: Fields, layers: int) -> list[int | None]:
        every = fields.integer("sliding_window_pattern", "_sliding_window_pattern", default=pattern)
        window = fields.integer("sliding_window")
        return [None if (layer + 1) % every == 0 else window for layer in range(layers)]

    return windows


def _attention_only(fields: Fields, layers: int) -> list[int | None]:
    return [None] * weights.mixed_layers(fields, layers).count("full_attention")


def _every_layer_if_used(fields: Fields, layers: int) -> list[int | None]:
    """Qwen3-MoE: a window in all layers, of 4,096 tokens where the config leaves it out."""
    if not fields.flag("use_sliding_window", False):
        return [None] * layers
    window = fields.optional("sliding_window") if "sliding_window" in fields.raw else 4096
    return [window] * layers


def _unused(fields: Fields, layers: int) -> list[int | None]:
    if fields.flag("use_sliding_window", False):
        raise ValueError("use_sliding_window needs layer_types, which say where the window is")
    return [None] * layers


def _chunks(fields: Fields, layers: int) -> list[int | None]:
    """Llama 4: layers with rotary positions keep their chunk, the others everything."""
    chunk, rotary = fields.optional("attention_chunk_size"), fields.raw.get("no_rope_layers") or None
    if rotary is None:
        step = fields.integer("no_rope_layer_interval", default=4)
        rotary = [int((layer + 1) % step != 0) for layer in range(layers)]
    if not isinstance(rotary, list) or len(rotary) != layers or not all(r in (0, 1) for r in rotary):
        raise ValueError(f"no_rope_layers must have 0 or 1 for each layer, not {shown(rotary)}")
    return [chunk if one else None for one in rotary]


# Always: no field of a config decides.
_BIASED = ("", True)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(weights.dense(2), _no_window),
    "mistral": Architecture(weights.dense(2), _every_layer),
    "mixtral": Architecture(weights.mixtral, _every_layer),
    "phi3": Architecture(weights.dense(2), _every_layer),
    "qwen2": Architecture(weights.dense(2, qkv_bias=True), _late_layers),
    "qwen3": Architecture(weights.dense(2, qk_norm=weights.norm_of_a_head), _late_layers),
    "qwen3_moe": Architecture(weights.qwen3_moe, _every_layer_if_used),
    "gemma": Architecture(weights.dense(2), _no_window, tied=True),
    "gemma2": Architecture(weights.dense(4), _all_but_every(2), tied=True),
    "gemma3_text": Architecture(
        weights.dense(4, qk_norm=weights.norm_of_a_head), _all_but_every(6), tied=True
    ),
    "gpt_oss": Architecture(weights.gpt_oss, _all_but_every(2), sinks=True),
    "deepseek_v2": Architecture(weights.deepseek, _no_window, latent=True),
    "deepseek_v3": Architecture(weights.deepseek, _no_window, latent=True),
    "deepseek_v32": Architecture(weights.deepseek, _no_window, latent=True, indexed=True),
    "kimi_k2": Architecture(weights.deepseek, _no_window, latent=True),
    "llama4_text": Architecture(weights.llama4, _chunks),
    "qwen3_next": Architecture(weights.qwen3_next, _attention_only, state=weights.delta_state),
    "qwen3_5_text": Architecture(weights.qwen3_next, _attention_only, state=weights.delta_state),
    "qwen2_moe": Architecture(weights.qwen2_moe, _late_layers),
    "baichuan": Architecture(weights.dense(2), _no_window),
    "internlm2": Architecture(weights.dense(2, bias=("bias", False)), _no_window),
    "ministral": Architecture(weights.dense(2), _every_layer),
    "ministral3": Architecture(weights.dense(2), _every_layer),
    "granite": Architecture(weights.dense(2), _no_window),
    "smollm3": Architecture(weights.dense(2), _unused, tied=True),
    "seed_oss": Architecture(
        weights.dense(2, bias=("attention_bias", True), out_bias=("attention_out_bias", False)), _no_window
    ),
    "glm": Architecture(
        weights.dense(2, bias=("attention_bias", True), out_bias=("attention_out_bias", False)), _no_window
    ),
    "glm4": Architecture(
        weights.dense(4, bias=("attention_bias", True), out_bias=("attention_out_bias", False)), _no_window
    ),
    "exaone4": Architecture(weights.dense(2, qk_norm=weights.norm_of_a_head), _all_but_every(4)),
    "olmo2": Architecture(weights.dense(2, qk_norm=weights.norm_of_heads), _no_window),
    "olmo3": Architecture(weights.dense(2, qk_norm=weights.norm_of_heads), _all_but_every(4)),
    "cohere": Architecture(weights.dense(1, qk_norm=weights.cohere_norm), _no_window, tied=True),
    "cohere2": Architecture(weights.dense(1), _all_but_every(4), tied=True),
    "stablelm": Architecture(weights.stablelm, _no_window, final_norm=2),
    "starcoder2": Architecture(
        weights.plain(4, bias=("use_bias", True)), _every_layer, tied=True, final_norm=2
    ),
    "phi": Architecture(weights.plain(2, bias=_BIASED), _no_window, final_norm=2, head_bias=True),
    "phi-msft": Architecture(weights.plain(2, bias=_BIASED), _no_window, final_norm=2, head_bias=True),
    "gptj": Architecture(
        weights.plain(2, bias=_BIASED, qkv_bias=("", False)), _no_window, final_norm=2, head_bias=True
    ),
    "bloom": Architecture(weights.plain(4, bias=_BIASED), _no_window, tied=True, final_norm=4),
    "opt": Architecture(
        weights.plain(4, bias=("enable_bias", True)),
        _no_window,
        tied=True,
        positions=True,
        final_norm=2,
        extra_positions=2,
    ),
    "mpt": Architecture(weights.mpt, _no_window, tied=True),
    "gpt_bigcode": Architecture(weights.gpt2, _no_window, tied=True, positions=True, final_norm=2),
    "gpt2": Architecture(weights.gpt2, _no_window, tied=True, positions=True, final_norm=2),
    "gpt_neox": Architecture(weights.gpt_neox, _no_window, final_norm=2),
    "falcon": Architecture(weights.falcon, _no_window, tied=True, final_norm=2),
}


def layer_windows(fields: Fields, architecture: Architecture, layers: int) -> list[int | None]:
    """The window of each layer, from `layer_types` if the config has them.

    Raises:
      ValueError: for `layer_types` of another length, or a kind of layer other than these two.
    """
    kinds = fields.layer_types(layers)
    if kinds is None or architecture.state is not None:
        return architecture.windows(fields, layers)
    if architecture.indexed:
        kinds = ["full_attention" if kind == "indexed_attention" else kind for kind in kinds]
    local = "chunked_attention" if architecture.windows is _chunks else "sliding_attention"
    for kind in kinds:
        if kind not in ("full_attention", local):
            raise ValueError(f"layer_types {shown(kind)} is not known; its cache cannot be counted")
    if local not in kinds:
        return [None] * layers
    window = fields.integer("sliding_window" if local == "sliding_attention" else "attention_chunk_size")
    return [window if kind == local else None for kind in kinds]
