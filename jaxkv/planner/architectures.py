"""Architectures by `model_type`: their weights, windows and what they have beside layers.

An architecture that is not in `ARCHITECTURES` is refused, since a guess may be wrong by gigabytes.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.planner import experts, gemma, hybrids, weights
from jaxkv.planner.weights import Layer, Sizes, dense, norm_of_a_head, norm_of_heads, plain

# Sizes of the model itself, which every config has.
ESSENTIAL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


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
      extra_rows: rows of the embedding beyond the vocabulary.
      embedded: field of the embedding's width, if a projection makes the hidden size of it, and back.
      head_bias: field and default for a bias of the output projection.
      context: tokens of context if the config does not say.
      kinds: the kind of each layer, where only those of "full_attention" keep K and V.
      state: elements of the states of fixed size of one sequence.
      kv_heads: KV heads, where another field than their number decides; None is the number.
      layer_sizes: KV heads and head_dim of each layer with K and V, where they differ.
      extra: weights of further embeddings, and of what else is beside layers.
      note: a caveat for a reader of the plan.
      renamed: the usual names of fields that have others.
      needed: fields without a default at the top level of a config; a part of one has only what its class's
        defaults do not say.
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
    extra_rows: int = 0
    embedded: str = ""
    head_bias: tuple[str, bool] = ("", False)
    context: int | None = None
    kinds: Callable[[Fields], list[str]] | None = None
    state: Callable[[Fields], int] | None = None
    kv_heads: Callable[[Fields], int | None] | None = None
    layer_sizes: Callable[[Fields, Sizes], list[tuple[int, int]]] | None = None
    extra: Callable[[Fields, Sizes], tuple[int, int]] | None = None
    note: str = ""
    renamed: Mapping[str, str] = MappingProxyType({})
    needed: tuple[str, ...] = ESSENTIAL


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
        flags = fields.window_pattern(layers, pattern, "_sliding_window_pattern")
        window = fields.integer("sliding_window")
        return [window if flag else None for flag in flags]

    return windows


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


def _to(renamed: str) -> dict[str, str]:
    """Fields of other names, as "theirs=ours"."""
    return dict(pair.split("=") for pair in renamed.split())


# Always: no field of a config decides.
_BIASED, _PLAIN = ("", True), ("", False)
_ATTENTION_BIAS, _USE_BIAS = ("attention_bias", False), ("use_bias", False)

_LLAMA = Architecture(dense(2), _no_window)
_MISTRAL = Architecture(dense(2), _every_layer)
_QWEN2 = Architecture(dense(2, qkv_bias=True), _late_layers)
_QWEN3 = Architecture(dense(2, qk_norm=norm_of_a_head), _late_layers)
_QWEN3_MOE = Architecture(experts.qwen3_moe, _every_layer_if_used)
_QWEN3_5 = Architecture(
    hybrids.qwen3_next(dense=True), _no_window, kinds=hybrids.qwen_kinds, state=hybrids.delta_state
)
_QWEN3_NEXT = Architecture(
    hybrids.qwen3_next(), _no_window, kinds=hybrids.qwen_kinds, state=hybrids.delta_state
)
_GLM4 = Architecture(weights.biased_inputs(4), _no_window)
_GLM4_MOE = Architecture(experts.glm4_moe, _no_window)
_DEEPSEEK_V3 = Architecture(experts.deepseek(router_bias=True), _no_window, latent=True)
_PHI = Architecture(plain(2, bias=_BIASED), _no_window, final_norm=2, head_bias=_BIASED)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA._replace(needed=(*ESSENTIAL, "vocab_size")),
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": _MISTRAL,
    "mixtral": Architecture(experts.sparse(), _every_layer),
    "phi3": _MISTRAL,
    "phimoe": Architecture(
        experts.sparse(4, bias=_ATTENTION_BIAS),
        _every_layer,
        final_norm=2,
        head_bias=("lm_head_bias", False),
    ),
    "qwen2": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_moe": Architecture(experts.qwen2_moe, _late_layers),
    "qwen3": _QWEN3,
    "qwen3_vl_text": Architecture(dense(2, qk_norm=norm_of_a_head), _no_window),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": Architecture(experts.qwen3_moe, _no_window),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "gemma": Architecture(dense(2), _no_window, tied=True),
    "gemma2": Architecture(dense(4), _all_but_every(2), tied=True),
    "gemma3_text": Architecture(dense(4, qk_norm=norm_of_a_head), _all_but_every(6), tied=True),
    "gemma3n_text": Architecture(
        gemma.gemma3n, gemma.all_but_every(5), tied=True, extra=gemma.extra_of_gemma3n
    ),
    "gemma4_text": Architecture(
        gemma.gemma4,
        gemma.all_but_every(6),
        tied=True,
        extra=gemma.extra_of_gemma4,
        layer_sizes=gemma.layer_sizes,
    ),
    "gpt_oss": Architecture(experts.gpt_oss, _all_but_every(2), sinks=True),
    "deepseek_v2": Architecture(experts.deepseek(router_bias=False), _no_window, latent=True),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": Architecture(
        experts.deepseek(router_bias=True, indexer=True), _no_window, latent=True, indexed=True
    ),
    "kimi_k2": _DEEPSEEK_V3,
    "llama4_text": Architecture(experts.llama4, _chunks),
    "minimax_m2": Architecture(experts.sparse(qk_norm=norm_of_heads, router_bias=True), _no_window),
    "olmo": Architecture(dense(0), _no_window, final_norm=0),
    "olmo2": Architecture(dense(2, qk_norm=norm_of_heads), _no_window),
    "olmo3": Architecture(dense(2, qk_norm=norm_of_heads), _all_but_every(4)),
    "olmoe": Architecture(experts.sparse(bias=_ATTENTION_BIAS, qk_norm=norm_of_heads), _no_window),
    "granite": _LLAMA,
    "granitemoe": Architecture(experts.sparse(bias=_ATTENTION_BIAS), _no_window),
    "granitemoehybrid": Architecture(
        hybrids.granite, _no_window, kinds=hybrids.granite_kinds, state=hybrids.granite_state
    ),
    "jamba": Architecture(hybrids.jamba, _no_window, kinds=hybrids.jamba_kinds, state=hybrids.jamba_state),
    "falcon_h1": Architecture(hybrids.falcon_h1, _no_window, state=hybrids.falcon_state),
    "nemotron_h": Architecture(
        hybrids.nemotron_h, _no_window, kinds=hybrids.nemotron_kinds, state=hybrids.nemotron_state
    ),
    "nemotron": Architecture(
        plain(4, bias=("mlp_bias", False), qkv_bias=_ATTENTION_BIAS), _no_window, final_norm=2
    ),
    "baichuan": _LLAMA,
    "internlm": Architecture(dense(2, bias=("bias", True)), _no_window),
    "internlm2": Architecture(dense(2, bias=("bias", False)), _no_window),
    "hunyuan_v1_dense": Architecture(dense(2, qk_norm=norm_of_a_head), _no_window),
    "smollm3": Architecture(dense(2), _unused, tied=True),
    "seed_oss": Architecture(weights.biased_inputs(2), _no_window),
    "glm": Architecture(weights.biased_inputs(2), _no_window),
    "glm4": _GLM4,
    "glm4v_text": _GLM4,
    "glm4_moe": _GLM4_MOE,
    "glm4v_moe_text": _GLM4_MOE,
    "chatglm": Architecture(
        dense(2, bias=("add_qkv_bias", False), out_bias=("add_bias_linear", False)),
        _no_window,
        kv_heads=weights.one_of_chatglm,
        renamed=_to(
            "padded_vocab_size=vocab_size num_layers=num_hidden_layers kv_channels=head_dim "
            "multi_query_group_num=num_key_value_heads ffn_hidden_size=intermediate_size "
            "seq_length=max_position_embeddings add_bias_linear=mlp_bias"
        ),
    ),
    "ernie4_5": Architecture(dense(2, bias=_USE_BIAS, mlp_bias=_USE_BIAS), _no_window, tied=True),
    "ernie4_5_moe": Architecture(experts.ernie, _no_window, tied=True),
    "exaone4": Architecture(dense(2, qk_norm=norm_of_a_head), _all_but_every(4)),
    "cohere": Architecture(dense(1, qk_norm=weights.cohere_norm), _no_window, tied=True),
    "cohere2": Architecture(dense(1), _all_but_every(4), tied=True),
    "mllama_text_model": Architecture(
        weights.mllama,
        _no_window,
        kinds=weights.mllama_kinds,
        extra_rows=8,
        note="K and V of images, in layers of their own, are not counted",
    ),
    "stablelm": Architecture(weights.stablelm, _no_window, final_norm=2),
    "starcoder2": Architecture(plain(4, bias=("use_bias", True)), _every_layer, tied=True, final_norm=2),
    "phi": _PHI,
    "phi-msft": _PHI,
    "gptj": Architecture(
        plain(2, bias=_BIASED, qkv_bias=_PLAIN), _no_window, final_norm=2, head_bias=_BIASED
    ),
    "bloom": Architecture(
        plain(4, bias=_BIASED),
        _no_window,
        tied=True,
        final_norm=4,
        context=2048,
        renamed=_to("n_embed=hidden_size seq_length=max_position_embeddings"),
    ),
    "opt": Architecture(
        plain(4, bias=("enable_bias", True)),
        _no_window,
        tied=True,
        positions=True,
        final_norm=2,
        extra_positions=2,
        embedded="word_embed_proj_dim",
    ),
    "mpt": Architecture(weights.mpt, _no_window, tied=True),
    "gpt_bigcode": Architecture(
        weights.gpt2, _no_window, tied=True, positions=True, final_norm=2, kv_heads=weights.one_of_bigcode
    ),
    "gpt2": Architecture(
        weights.gpt2, _no_window, tied=True, positions=True, final_norm=2, kv_heads=weights.one_of_gpt2
    ),
    "gpt_neox": Architecture(weights.gpt_neox, _no_window, final_norm=2),
    "falcon": Architecture(
        weights.falcon, _no_window, tied=True, final_norm=2, kv_heads=weights.one_of_falcon, context=2048
    ),
}


def layer_windows(fields: Fields, architecture: Architecture, layers: int) -> list[int | None]:
    """The window of each layer, from `layer_types` if the config has them.

    Raises:
      ValueError: for `layer_types` of another length, or a kind of layer other than these two.
    """
    if architecture.kinds is not None:
        return [None] * architecture.kinds(fields).count("full_attention")
    kinds = fields.layer_types(layers)
    if kinds is None or architecture.extra is not None:
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
