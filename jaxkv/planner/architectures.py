"""Number of weights and windows of the layers of each architecture, from its `config.json`.

Counts follow the modules of Hugging Face `transformers`; `tests/test_planner.py` compares them with published
counts. An architecture that is not in `ARCHITECTURES` is refused, since a guess may be wrong by gigabytes.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown


class Sizes(NamedTuple):
    """Sizes of attention and of the residual stream."""

    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int


class Layer(NamedTuple):
    """Number of weights of one layer.

    Attributes:
      total: all weights.
      routed: weights of experts that a router chooses from.
      active: weights that one token uses.
    """

    total: int
    routed: int = 0
    active: int | None = None


class Architecture(NamedTuple):
    """One `model_type`.

    Attributes:
      layers: weights of every layer.
      windows: window of every layer if the config has no `layer_types`; None is all tokens.
      tied: whether the output projection is the embedding table, if the config does not say.
      positions: whether positions have a table of weights.
      final_norm: weights per feature of the norm before the output projection.
      latent: whether a token has one latent vector instead of K and V (MLA).
      sinks: whether heads have a learned attention sink.
    """

    layers: Callable[[Fields, Sizes], list[Layer]]
    windows: Callable[[Fields, int], list[int | None]]
    tied: bool = False
    positions: bool = False
    final_norm: int = 1
    latent: bool = False
    sinks: bool = False


def sizes(fields: Fields, *, latent: bool) -> Sizes:
    """The sizes, by the field names that most configs use or by GPT-2's."""
    hidden = fields.integer("hidden_size", "n_embd")
    q_heads = fields.integer("num_attention_heads", "n_head")
    if latent:
        # MLA has other head sizes, and ignores `num_key_value_heads`.
        return Sizes(hidden, fields.integer("num_hidden_layers"), q_heads, 1, 1)
    if fields.raw.get("model_type") == "falcon" and not fields.flag("new_decoder_architecture", False):
        kv_heads = 1 if fields.flag("multi_query", True) else q_heads
    else:
        kv_heads = fields.integer("num_key_value_heads", "num_kv_heads", default=q_heads)
    if q_heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={q_heads}")
    if fields.optional("head_dim") is None and hidden % q_heads:
        raise ValueError(
            f"hidden_size={hidden} must be a multiple of num_attention_heads={q_heads} without head_dim"
        )
    return Sizes(
        hidden=hidden,
        layers=fields.integer("num_hidden_layers", "n_layer"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", default=hidden // q_heads),
    )


def _attention(size: Sizes, *, qkv_bias: bool = False, out_bias: bool = False) -> int:
    q, kv = size.q_heads * size.head_dim, size.kv_heads * size.head_dim
    return 2 * size.hidden * (q + kv) + qkv_bias * (q + 2 * kv) + out_bias * size.hidden


def _dense(norms: int, *, qkv_bias: bool | None = None, qk_norm: bool = False):
    """Layers with a gated MLP and `norms` norms; `qkv_bias` None takes `attention_bias` of the config."""

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        biased = fields.flag("attention_bias", False)
        attention = _attention(
            size, qkv_bias=biased if qkv_bias is None else qkv_bias, out_bias=biased and qkv_bias is None
        )
        width = fields.integer("intermediate_size")
        mlp = 3 * size.hidden * width + fields.flag("mlp_bias", False) * (2 * width + size.hidden)
        total = attention + mlp + norms * size.hidden + 2 * size.head_dim * qk_norm
        return [Layer(total)] * size.layers

    return layers


def _experts(one: int, count: int, chosen: int, rest: int) -> Layer:
    """A layer with `count` experts of `one` weights, of which a token uses `chosen`, and `rest` weights."""
    if chosen > count:
        raise ValueError(f"num_experts_per_tok={chosen} is more than the {count} experts there are")
    return Layer(rest + count * one, count * one, rest + chosen * one)


def _mixtral(fields: Fields, size: Sizes) -> list[Layer]:
    count, chosen = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    rest = _attention(size) + 2 * size.hidden + size.hidden * count
    one = 3 * size.hidden * fields.integer("intermediate_size")
    return [_experts(one, count, chosen, rest)] * size.layers


def _qwen3_moe(fields: Fields, size: Sizes) -> list[Layer]:
    biased = fields.flag("attention_bias", False)
    rest = _attention(size, qkv_bias=biased, out_bias=biased) + 2 * size.hidden + 2 * size.head_dim
    count = fields.integer("num_experts", "num_local_experts")
    one = 3 * size.hidden * fields.integer("moe_intermediate_size")
    sparse = _experts(one, count, fields.integer("num_experts_per_tok"), rest + size.hidden * count)
    dense = Layer(rest + 3 * size.hidden * fields.integer("intermediate_size"))
    step, only = fields.integer("decoder_sparse_step", default=1), fields.raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise ValueError(f"mlp_only_layers must be a list of layers, not {shown(only)}")
    return [sparse if n not in only and (n + 1) % step == 0 else dense for n in range(size.layers)]


def _gpt_oss(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("intermediate_size")
    count, chosen = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    one = 3 * hidden * width + 2 * width + hidden
    # The router, sinks and norms.
    rest = _attention(size, qkv_bias=True, out_bias=True) + hidden * count + count + size.q_heads + 2 * hidden
    return [_experts(one, count, chosen, rest)] * size.layers


def _deepseek(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, heads, latent = size.hidden, size.q_heads, fields.integer("kv_lora_rank")
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    value, q_rank = fields.integer("v_head_dim"), fields.optional("q_lora_rank")
    q = heads * (nope + rope)
    queries = hidden * q if q_rank is None else hidden * q_rank + q_rank + q_rank * q
    keys = hidden * (latent + rope) + latent + latent * heads * (nope + value)
    rest = queries + keys + heads * value * hidden + 2 * hidden
    dense = Layer(rest + 3 * hidden * fields.integer("intermediate_size"))
    width, count = fields.integer("moe_intermediate_size"), fields.integer("n_routed_experts")
    shared = 3 * hidden * width * fields.integer("n_shared_experts", default=0, least=0)
    # DeepSeek-V3's router has a bias for each expert.
    shared += count if fields.raw.get("model_type") == "deepseek_v3" else 0
    sparse = _experts(
        3 * hidden * width, count, fields.integer("num_experts_per_tok"), rest + hidden * count + shared
    )
    first = fields.integer("first_k_dense_replace", default=0, least=0)
    every = fields.integer("moe_layer_freq", default=1)
    return [sparse if n >= first and n % every == 0 else dense for n in range(size.layers)]


def _gpt2(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("n_inner", default=4 * size.hidden)
    attention = _attention(size, qkv_bias=True, out_bias=True)
    return [Layer(attention + 2 * hidden * width + width + hidden + 4 * hidden)] * size.layers


def _gpt_neox(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("intermediate_size")
    biased = fields.flag("attention_bias", True)
    attention = _attention(size, qkv_bias=biased, out_bias=biased)
    return [Layer(attention + 2 * hidden * width + width + hidden + 4 * hidden)] * size.layers


def _falcon(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, biased = size.hidden, fields.flag("bias", False)
    width = fields.integer("ffn_hidden_size", default=4 * hidden)
    mlp = 2 * hidden * width + biased * (width + hidden)
    # One norm if attention and MLP read the same input, else two; each has a bias.
    one = fields.flag("parallel_attn", True) and not fields.flag("new_decoder_architecture", False)
    norms = (2 if one else 4) * hidden
    return [Layer(_attention(size, qkv_bias=biased, out_bias=biased) + mlp + norms)] * size.layers


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


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_dense(2), _no_window),
    "mistral": Architecture(_dense(2), _every_layer),
    "mixtral": Architecture(_mixtral, _every_layer),
    "phi3": Architecture(_dense(2), _every_layer),
    "qwen2": Architecture(_dense(2, qkv_bias=True), _late_layers),
    "qwen3": Architecture(_dense(2, qk_norm=True), _late_layers),
    "qwen3_moe": Architecture(_qwen3_moe, _late_layers),
    "gemma": Architecture(_dense(2), _no_window, tied=True),
    "gemma2": Architecture(_dense(4), _all_but_every(2), tied=True),
    "gemma3_text": Architecture(_dense(4, qk_norm=True), _all_but_every(6), tied=True),
    "gpt_oss": Architecture(_gpt_oss, _all_but_every(2), sinks=True),
    "deepseek_v2": Architecture(_deepseek, _no_window, latent=True),
    "deepseek_v3": Architecture(_deepseek, _no_window, latent=True),
    "gpt2": Architecture(_gpt2, _no_window, tied=True, positions=True, final_norm=2),
    "gpt_neox": Architecture(_gpt_neox, _no_window, final_norm=2),
    "falcon": Architecture(_falcon, _no_window, tied=True, final_norm=2),
}


def mlp_width(fields: Fields, hidden: int) -> int:
    """Most MLP features that one token uses, in a dense layer or in all its experts."""
    dense = fields.integer("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden)
    one = fields.integer("moe_intermediate_size", default=dense)
    chosen = fields.integer("num_experts_per_tok", default=1)
    return max(dense, one * (chosen + fields.integer("n_shared_experts", default=0, least=0)))


def layer_windows(fields: Fields, architecture: Architecture, layers: int) -> list[int | None]:
    """The window of each layer, from `layer_types` if the config has them.

    Raises:
      ValueError: for `layer_types` of another length, or a kind of layer other than these two.
    """
    kinds = fields.layer_types(layers)
    if kinds is None:
        return architecture.windows(fields, layers)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types {shown(kind)} is not known; its cache cannot be counted")
    if "sliding_attention" not in kinds:
        return [None] * layers
    window = fields.integer("sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]
