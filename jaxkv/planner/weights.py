"""Sizes of attention and number of weights of the layers of each architecture.

Counts follow the modules of Hugging Face `transformers`; `tests/test_planner_cases.py` compares them with
those of published models.
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


def sizes(fields: Fields, *, latent: bool) -> Sizes:
    """The sizes, by the field names that most configs use or by GPT-2's."""
    hidden = fields.integer("hidden_size", "n_embd", "d_model")
    q_heads = fields.integer("num_attention_heads", "n_head", "n_heads")
    if latent:
        # MLA has other head sizes, and ignores `num_key_value_heads`.
        return Sizes(hidden, fields.integer("num_hidden_layers"), q_heads, 1, 1)
    if fields.raw.get("model_type") == "falcon" and not fields.flag("new_decoder_architecture", False):
        kv_heads = 1 if fields.flag("multi_query", True) else q_heads
    elif _is_multi_query(fields):
        kv_heads = 1
    else:
        kv_heads = fields.integer("num_key_value_heads", "num_kv_heads", "n_head_kv", default=q_heads)
    if q_heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={q_heads}")
    if fields.optional("head_dim") is None and hidden % q_heads:
        raise ValueError(
            f"hidden_size={hidden} must be a multiple of num_attention_heads={q_heads} without head_dim"
        )
    return Sizes(
        hidden=hidden,
        layers=fields.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", default=hidden // q_heads),
    )


def _is_multi_query(fields: Fields) -> bool:
    """Whether GPT-2's and GPT-BigCode's heads share one K and V."""
    kind = fields.raw.get("model_type")
    if kind == "gpt_bigcode":
        return fields.flag("multi_query", True)
    named = fields.raw.get("attention_head_type") if kind == "gpt2" else None
    if named not in (None, "multihead", "multiquery"):
        raise ValueError(f"attention_head_type {shown(named)} is not known")
    return named == "multiquery"


def _attention(size: Sizes, *, qkv_bias: bool = False, out_bias: bool = False) -> int:
    q, kv = size.q_heads * size.head_dim, size.kv_heads * size.head_dim
    return 2 * size.hidden * (q + kv) + qkv_bias * (q + 2 * kv) + out_bias * size.hidden


def norm_of_a_head(fields: Fields, size: Sizes) -> int:
    """Weights of norms of Q and K that all heads share."""
    return 2 * size.head_dim


def norm_of_heads(fields: Fields, size: Sizes) -> int:
    """Weights of norms of Q and K across all heads, or of each."""
    return (size.q_heads + size.kv_heads) * size.head_dim


def cohere_norm(fields: Fields, size: Sizes) -> int:
    """Cohere's norms of each head, if the config asks for them."""
    return norm_of_heads(fields, size) if fields.flag("use_qk_norm", False) else 0


def plain(norms: int, *, bias: tuple[str, bool], qkv_bias: tuple[str, bool] | None = None):
    """Layers with an MLP of two matrices and `norms` weights of norms per feature.

    Args:
      norms: weights per feature.
      bias: field and default for the biases of the MLP.
      qkv_bias: field and default for those of attention, if they differ.
    """

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        hidden, biased = size.hidden, fields.flag(*bias)
        inputs = biased if qkv_bias is None else fields.flag(*qkv_bias)
        width = fields.integer("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
        mlp = 2 * hidden * width + biased * (width + hidden)
        return [
            Layer(_attention(size, qkv_bias=inputs, out_bias=inputs) + mlp + norms * hidden)
        ] * size.layers

    return layers


def mpt(fields: Fields, size: Sizes) -> list[Layer]:
    options = fields.raw.get("attn_config") or {}
    if not isinstance(options, dict):
        raise ValueError(f"attn_config must be an object, not {shown(options)}")
    if options.get("attn_type", "multihead_attention") != "multihead_attention":
        raise ValueError(f"attn_type {shown(options['attn_type'])} is not known; its cache cannot be counted")
    if not fields.flag("no_bias", True):
        raise ValueError("no_bias must be true: biases are not counted")
    width = fields.integer("expansion_ratio", default=4) * size.hidden
    return [Layer(_attention(size) + 2 * size.hidden * width + 2 * size.hidden)] * size.layers


def stablelm(fields: Fields, size: Sizes) -> list[Layer]:
    norms = 2 if fields.flag("use_parallel_residual", False) else 4
    extra = norm_of_heads(fields, size) if fields.flag("qk_layernorm", False) else 0
    attention = _attention(size, qkv_bias=fields.flag("use_qkv_bias", False))
    mlp = 3 * size.hidden * fields.integer("intermediate_size")
    return [Layer(attention + mlp + norms * size.hidden + extra)] * size.layers


def llama4(fields: Fields, size: Sizes) -> list[Layer]:
    biased, hidden = fields.flag("attention_bias", False), size.hidden
    rest = _attention(size, qkv_bias=biased, out_bias=biased) + 2 * hidden
    count, one = fields.integer("num_local_experts"), 3 * hidden * fields.integer("intermediate_size")
    # One expert is shared by all tokens.
    chosen = fields.integer("num_experts_per_tok", default=1)
    sparse = _experts(one, count, chosen, rest + hidden * count + one)
    step = fields.integer("interleave_moe_layer_step", default=1)
    named = fields.raw.get("moe_layers")
    if named is not None and (not isinstance(named, list) or not all(type(n) is int for n in named)):
        raise ValueError(f"moe_layers must be a list of layers, not {shown(named)}")
    chosen_layers = range(step - 1, size.layers, step) if named is None else named
    if all(n in chosen_layers for n in range(size.layers)):
        return [sparse] * size.layers
    dense_layer = Layer(rest + 3 * hidden * fields.integer("intermediate_size_mlp"))
    return [sparse if n in chosen_layers else dense_layer for n in range(size.layers)]


def dense(
    norms: int,
    *,
    qkv_bias: bool | None = None,
    bias: tuple[str, bool] = ("attention_bias", False),
    out_bias: tuple[str, bool] | None = None,
    qk_norm: Callable[[Fields, Sizes], int] | None = None,
):
    """Layers with a gated MLP and `norms` weights of norms per feature.

    Args:
      norms: weights per feature.
      qkv_bias: whether the projections of attention's inputs have biases; None takes the field `bias`.
      bias: field and default for all projections of attention.
      out_bias: field and default for the output projection, if it has one of its own.
      qk_norm: weights of the norms of Q and K.
    """

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        biased = fields.flag(*bias)
        after = biased and qkv_bias is None if out_bias is None else fields.flag(*out_bias)
        attention = _attention(size, qkv_bias=biased if qkv_bias is None else qkv_bias, out_bias=after)
        width = fields.integer("intermediate_size")
        mlp = 3 * size.hidden * width + fields.flag("mlp_bias", False) * (2 * width + size.hidden)
        total = attention + mlp + norms * size.hidden + (0 if qk_norm is None else qk_norm(fields, size))
        return [Layer(total)] * size.layers

    return layers


def _experts(one: int, count: int, chosen: int, rest: int) -> Layer:
    """A layer with `count` experts of `one` weights, of which a token uses `chosen`, and `rest` weights."""
    if chosen > count:
        raise ValueError(f"num_experts_per_tok={chosen} is more than the {count} experts there are")
    return Layer(rest + count * one, count * one, rest + chosen * one)


def mixtral(fields: Fields, size: Sizes) -> list[Layer]:
    count, chosen = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    rest = _attention(size) + 2 * size.hidden + size.hidden * count
    one = 3 * size.hidden * fields.integer("intermediate_size")
    return [_experts(one, count, chosen, rest)] * size.layers


def qwen3_moe(fields: Fields, size: Sizes) -> list[Layer]:
    biased = fields.flag("attention_bias", False)
    return _qwen_moe(fields, size, _attention(size, qkv_bias=biased, out_bias=biased) + 2 * size.head_dim)


def qwen2_moe(fields: Fields, size: Sizes) -> list[Layer]:
    # The shared expert has a gate.
    shared = 3 * size.hidden * fields.integer("shared_expert_intermediate_size") + size.hidden
    return _qwen_moe(fields, size, _attention(size, qkv_bias=fields.flag("qkv_bias", True)), shared)


def _qwen_moe(fields: Fields, size: Sizes, attention: int, shared: int = 0) -> list[Layer]:
    rest = attention + 2 * size.hidden
    count = fields.integer("num_experts", "num_local_experts")
    one = 3 * size.hidden * fields.integer("moe_intermediate_size")
    sparse = _experts(one, count, fields.integer("num_experts_per_tok"), rest + shared + size.hidden * count)
    dense = Layer(rest + 3 * size.hidden * fields.integer("intermediate_size"))
    step, only = fields.integer("decoder_sparse_step", default=1), fields.raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise ValueError(f"mlp_only_layers must be a list of layers, not {shown(only)}")
    return [sparse if n not in only and (n + 1) % step == 0 else dense for n in range(size.layers)]


def gpt_oss(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("intermediate_size")
    count, chosen = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    one = 3 * hidden * width + 2 * width + hidden
    # The router, sinks and norms.
    rest = _attention(size, qkv_bias=True, out_bias=True) + hidden * count + count + size.q_heads + 2 * hidden
    return [_experts(one, count, chosen, rest)] * size.layers


def deepseek(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, heads, latent = size.hidden, size.q_heads, fields.integer("kv_lora_rank")
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    value, q_rank = fields.integer("v_head_dim"), fields.optional("q_lora_rank")
    q = heads * (nope + rope)
    queries = hidden * q if q_rank is None else hidden * q_rank + q_rank + q_rank * q
    keys = hidden * (latent + rope) + latent + latent * heads * (nope + value)
    if fields.flag("attention_bias", False):
        keys += latent + rope + hidden + (q_rank or 0)
    rest = queries + keys + heads * value * hidden + 2 * hidden + _indexer(fields, hidden, q_rank)
    dense = Layer(rest + 3 * hidden * fields.integer("intermediate_size"))
    width, count = fields.integer("moe_intermediate_size"), fields.integer("n_routed_experts")
    shared = 3 * hidden * width * fields.integer("n_shared_experts", default=0, least=0)
    # DeepSeek-V3's router has a bias for each expert.
    shared += 0 if fields.raw.get("model_type") == "deepseek_v2" else count
    sparse = _experts(
        3 * hidden * width, count, fields.integer("num_experts_per_tok"), rest + hidden * count + shared
    )
    first = fields.integer("first_k_dense_replace", default=0, least=0)
    every = fields.integer("moe_layer_freq", default=1)
    return [sparse if n >= first and n % every == 0 else dense for n in range(size.layers)]


def _indexer(fields: Fields, hidden: int, q_rank: int | None) -> int:
    """Weights of DeepSeek-V3.2's indexer, which chooses the tokens that a query attends to."""
    if fields.raw.get("model_type") != "deepseek_v32":
        return 0
    if q_rank is None:
        raise ValueError("field 'q_lora_rank' is missing: the indexer reads the compressed queries")
    heads, width = fields.integer("index_n_heads"), fields.integer("index_head_dim")
    return q_rank * heads * width + hidden * width + 2 * width + hidden * heads


def gpt2(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("n_inner", default=4 * size.hidden)
    attention = _attention(size, qkv_bias=True, out_bias=True)
    return [Layer(attention + 2 * hidden * width + width + hidden + 4 * hidden)] * size.layers


def gpt_neox(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("intermediate_size")
    biased = fields.flag("attention_bias", True)
    attention = _attention(size, qkv_bias=biased, out_bias=biased)
    return [Layer(attention + 2 * hidden * width + width + hidden + 4 * hidden)] * size.layers


def falcon(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, biased = size.hidden, fields.flag("bias", False)
    width = fields.integer("ffn_hidden_size", default=4 * hidden)
    mlp = 2 * hidden * width + biased * (width + hidden)
    # One norm if attention and MLP read the same input, else two; each has a bias.
    one = fields.flag("parallel_attn", True) and not fields.flag("new_decoder_architecture", False)
    norms = (2 if one else 4) * hidden
    return [Layer(_attention(size, qkv_bias=biased, out_bias=biased) + mlp + norms)] * size.layers


def mlp_width(fields: Fields, hidden: int) -> int:
    """Most MLP features that one token uses, in a dense layer or in all its experts."""
    dense = fields.integer("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden)
    one = fields.integer("moe_intermediate_size", default=dense)
    chosen = fields.integer("num_experts_per_tok", default=1)
    return max(dense, one * (chosen + fields.integer("n_shared_experts", default=0, least=0)))


def qwen3_next(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers with gated attention or a gated delta rule, before an MLP or experts."""
    hidden, biased = size.hidden, fields.flag("attention_bias", False)
    # Each query has a gate of its width.
    gated = _attention(size, qkv_bias=biased, out_bias=biased) + 2 * size.head_dim
    gated += size.q_heads * size.head_dim * (hidden + biased)
    delta = _delta(fields)
    values, channels = delta.heads * delta.value, delta.channels
    linear = hidden * (channels + 2 * values + 2 * delta.heads) + channels * delta.kernel
    linear += 2 * delta.heads + delta.value
    mixers = [linear if kind == "linear_attention" else gated for kind in mixed_layers(fields, size.layers)]
    if fields.raw.get("model_type") == "qwen3_5_text":
        mlp = 3 * hidden * fields.integer("intermediate_size") + 2 * hidden
        return [Layer(mixer + mlp) for mixer in mixers]
    shared = 3 * hidden * fields.integer("shared_expert_intermediate_size") + hidden
    return [_qwen_moe(fields, size, mixer, shared)[layer] for layer, mixer in enumerate(mixers)]


class _Delta(NamedTuple):
    """Sizes of a gated delta rule."""

    heads: int
    key: int
    value: int
    channels: int
    kernel: int


def _delta(fields: Fields) -> _Delta:
    heads, keys = fields.integer("linear_num_value_heads"), fields.integer("linear_num_key_heads")
    key, value = fields.integer("linear_key_head_dim"), fields.integer("linear_value_head_dim")
    return _Delta(heads, key, value, 2 * keys * key + heads * value, fields.integer("linear_conv_kernel_dim"))


def mixed_layers(fields: Fields, layers: int) -> list[str]:
    """`linear_attention` or `full_attention` of each layer of Qwen3-Next and Qwen3.5.

    Raises:
      ValueError: for another kind of layer.
    """
    kinds = fields.layer_types(layers)
    if kinds is None:
        every = fields.integer("full_attention_interval", default=4)
        return ["linear_attention" if (n + 1) % every else "full_attention" for n in range(layers)]
    for kind in kinds:
        if kind not in ("linear_attention", "full_attention"):
            raise ValueError(f"layer_types {shown(kind)} is not known; its cache cannot be counted")
    return kinds


def delta_state(fields: Fields, layers: int) -> int:
    """Elements of the states of one sequence: a matrix for each head, and the inputs of a convolution."""
    delta, kinds = _delta(fields), mixed_layers(fields, layers)
    one = delta.heads * delta.key * delta.value + delta.channels * delta.kernel
    return kinds.count("linear_attention") * one
