"""Number of weights of layers with experts."""

from collections.abc import Callable

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.planner.weights import Layer, Sizes, attention_weights


def llama4(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers with experts, one of them shared, in turn with an MLP."""
    biased, hidden = fields.flag("attention_bias", False), size.hidden
    rest = attention_weights(size, qkv_bias=biased, out_bias=biased) + 2 * hidden
    count, one = fields.integer("num_local_experts"), 3 * hidden * fields.integer("intermediate_size")
    # One expert is shared by all tokens.
    chosen = fields.integer("num_experts_per_tok", default=1)
    sparse = experts(one, count, chosen, rest + hidden * count + one)
    step = fields.integer("interleave_moe_layer_step", default=1)
    named = fields.raw.get("moe_layers")
    if named is not None and (not isinstance(named, list) or not all(type(n) is int for n in named)):
        raise ValueError(f"moe_layers must be a list of layers, not {shown(named)}")
    chosen_layers = range(step - 1, size.layers, step) if named is None else named
    if all(n in chosen_layers for n in range(size.layers)):
        return [sparse] * size.layers
    dense_layer = Layer(rest + 3 * hidden * fields.integer("intermediate_size_mlp"))
    return [sparse if n in chosen_layers else dense_layer for n in range(size.layers)]


def experts(one: int, count: int, chosen: int, rest: int) -> Layer:
    """A layer with `count` experts of `one` weights, of which a token uses `chosen`, and `rest` weights."""
    if chosen > count:
        raise ValueError(f"num_experts_per_tok={chosen} is more than the {count} experts there are")
    return Layer(rest + count * one, count * one, rest + chosen * one)


def sparse(
    norms: int = 2,
    *,
    bias: tuple[str, bool] = ("", False),
    qk_norm: Callable[[Fields, Sizes], int] | None = None,
    router_bias: bool = False,
):
    """Layers of experts only, as Mixtral's.

    Args:
      norms: weights of norms per feature.
      bias: field and default for the biases of attention.
      qk_norm: weights of the norms of Q and K.
      router_bias: whether the router has a bias for each expert.
    """

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        count = fields.integer("num_local_experts", "num_experts")
        biased = fields.flag(*bias)
        rest = attention_weights(size, qkv_bias=biased, out_bias=biased) + norms * size.hidden
        rest += size.hidden * count + router_bias * count + (0 if qk_norm is None else qk_norm(fields, size))
        one = 3 * size.hidden * fields.integer("intermediate_size")
        return [experts(one, count, fields.integer("num_experts_per_tok"), rest)] * size.layers

    return layers


def qwen3_moe(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers with experts and norms of Q and K."""
    biased = fields.flag("attention_bias", False)
    return qwen_experts(
        fields, size, attention_weights(size, qkv_bias=biased, out_bias=biased) + 2 * size.head_dim
    )


def qwen2_moe(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers with experts, of which one is shared by all tokens."""
    # The shared expert has a gate.
    shared = 3 * size.hidden * fields.integer("shared_expert_intermediate_size") + size.hidden
    return qwen_experts(fields, size, attention_weights(size, qkv_bias=fields.flag("qkv_bias", True)), shared)


def qwen_experts(fields: Fields, size: Sizes, attention: int, shared: int = 0) -> list[Layer]:
    """Layers with experts, or an MLP where the config says so, after mixers of `attention` weights."""
    rest = attention + 2 * size.hidden
    count = fields.integer("num_experts", "num_local_experts")
    one = 3 * size.hidden * fields.integer("moe_intermediate_size")
    sparse = experts(one, count, fields.integer("num_experts_per_tok"), rest + shared + size.hidden * count)
    step, only = fields.integer("decoder_sparse_step", default=1), fields.raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise ValueError(f"mlp_only_layers must be a list of layers, not {shown(only)}")
    chosen = [n not in only and (n + 1) % step == 0 for n in range(size.layers)]
    if all(chosen):
        return [sparse] * size.layers
    dense = Layer(rest + 3 * size.hidden * fields.integer("intermediate_size"))
    return [sparse if one else dense for one in chosen]


def gpt_oss(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers of experts with biases, and attention with sinks."""
    hidden, width = size.hidden, fields.integer("intermediate_size")
    count, chosen = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    one = 3 * hidden * width + 2 * width + hidden
    # The router, sinks and norms.
    rest = (
        attention_weights(size, qkv_bias=True, out_bias=True)
        + hidden * count
        + count
        + size.q_heads
        + 2 * hidden
    )
    return [experts(one, count, chosen, rest)] * size.layers


def deepseek(*, router_bias: bool, indexer: bool = False):
    """Layers with MLA before experts; the first have an MLP.

    Args:
      router_bias: whether the router has a bias for each expert.
      indexer: whether an indexer chooses the tokens that a query attends to.
    """

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        hidden, heads, latent = size.hidden, size.q_heads, fields.integer("kv_lora_rank")
        nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
        value, q_rank = fields.integer("v_head_dim"), fields.optional("q_lora_rank")
        q = heads * (nope + rope)
        queries = hidden * q if q_rank is None else hidden * q_rank + q_rank + q_rank * q
        keys = hidden * (latent + rope) + latent + latent * heads * (nope + value)
        if fields.flag("attention_bias", False):
            keys += latent + rope + hidden + (q_rank or 0)
        rest = queries + keys + heads * value * hidden + 2 * hidden
        return _later_experts(
            fields, size, rest + (_indexer(fields, hidden, q_rank) if indexer else 0), router_bias
        )

    return layers


def _later_experts(fields: Fields, size: Sizes, rest: int, router_bias: bool) -> list[Layer]:
    """Experts, some of them shared, after `first_k_dense_replace` layers with an MLP."""
    hidden, width = size.hidden, fields.integer("moe_intermediate_size")
    count = fields.integer("n_routed_experts")
    dense = Layer(rest + 3 * hidden * fields.integer("intermediate_size"))
    shared = 3 * hidden * width * fields.integer("n_shared_experts", default=0, least=0)
    shared += router_bias * count
    sparse = experts(
        3 * hidden * width, count, fields.integer("num_experts_per_tok"), rest + hidden * count + shared
    )
    first = fields.integer("first_k_dense_replace", default=0, least=0)
    every = fields.integer("moe_layer_freq", default=1)
    return [sparse if n >= first and n % every == 0 else dense for n in range(size.layers)]


def glm4_moe(fields: Fields, size: Sizes) -> list[Layer]:
    """As DeepSeek-V3, with attention of K and V."""
    rest = attention_weights(size, qkv_bias=fields.flag("attention_bias", False)) + 2 * size.hidden
    rest += 2 * size.head_dim * fields.flag("use_qk_norm", False)
    return _later_experts(fields, size, rest, router_bias=True)


def ernie(fields: Fields, size: Sizes) -> list[Layer]:
    """ERNIE 4.5: experts in some layers, with biases where the config says so."""
    hidden, biased = size.hidden, fields.flag("use_bias", False)
    rest = attention_weights(size, qkv_bias=biased, out_bias=biased) + 2 * hidden
    width, wide = fields.integer("moe_intermediate_size"), fields.integer("intermediate_size")
    count, shared = fields.integer("moe_num_experts"), fields.integer("moe_num_shared_experts", least=0)
    one = 3 * hidden * width
    always = rest + hidden * count + count + shared * (one + 2 * width * biased) + hidden * biased
    sparse = experts(one, count, fields.integer("moe_k"), always)
    dense = Layer(rest + 3 * hidden * wide + biased * (2 * wide + hidden))
    last, every = fields.raw.get("moe_layer_end_index"), fields.integer("moe_layer_interval")
    last = size.layers - 1 if last in (None, -1) else fields.integer("moe_layer_end_index", least=0)
    chosen = range(fields.integer("moe_layer_start_index", least=0), last + 1)
    return [sparse if n in chosen and (n + 1) % every == 0 else dense for n in range(size.layers)]


def _indexer(fields: Fields, hidden: int, q_rank: int | None) -> int:
    """Weights of DeepSeek-V3.2's indexer, which chooses the tokens that a query attends to."""
    if q_rank is None:
        raise ValueError("field 'q_lora_rank' is missing: the indexer reads the compressed queries")
    heads, width = fields.integer("index_n_heads"), fields.integer("index_head_dim")
    return q_rank * heads * width + hidden * width + 2 * width + hidden * heads
