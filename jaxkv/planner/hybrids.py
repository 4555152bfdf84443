"""Layers of models that mix attention with states of fixed size: their kinds, weights and states."""

from typing import NamedTuple

from jaxkv.checkpoints.fields import Fields, most
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.planner.experts import experts, qwen_experts
from jaxkv.planner.weights import Layer, Sizes, attention_weights

ATTENTION, LINEAR = "full_attention", "linear_attention"


def qwen3_next(*, dense: bool = False):
    """Layers with gated attention or a gated delta rule, before an MLP if `dense`, or experts."""

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        hidden, biased = size.hidden, fields.flag("attention_bias", False)
        # Each query has a gate of its width.
        gated = attention_weights(size, qkv_bias=biased, out_bias=biased) + 2 * size.head_dim
        gated += size.q_heads * size.head_dim * (hidden + biased)
        delta = _delta(fields)
        values, channels = delta.heads * delta.value, delta.channels
        linear = hidden * (channels + 2 * values + 2 * delta.heads) + channels * delta.kernel
        linear += 2 * delta.heads + delta.value
        mixers = [gated if kind == ATTENTION else linear for kind in qwen_kinds(fields)]
        if dense:
            mlp = 3 * hidden * fields.integer("intermediate_size") + 2 * hidden
            return [Layer(mixer + mlp) for mixer in mixers]
        shared = 3 * hidden * fields.integer("shared_expert_intermediate_size") + hidden
        of_kind = {mixer: qwen_experts(fields, size, mixer, shared) for mixer in set(mixers)}
        return [of_kind[mixer][layer] for layer, mixer in enumerate(mixers)]

    return layers


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


def delta_state(fields: Fields) -> int:
    """Elements of the states of one sequence: a matrix for each head, and the inputs of a convolution."""
    delta = _delta(fields)
    one = delta.heads * delta.key * delta.value + delta.channels * delta.kernel
    return qwen_kinds(fields).count(LINEAR) * one


def _named(fields: Fields, layers: int, other: str = LINEAR) -> list[str] | None:
    """The kinds in `layer_types` or its older name, or None if the config does not say."""
    old = fields.raw.get("layers_block_type")
    both = Fields({"layer_types": fields.raw.get("layer_types") or old})
    kinds = both.layer_types(layers)
    if kinds is None:
        return None
    kinds = [LINEAR if kind in ("mamba", "hybrid") else kind for kind in kinds]
    for kind in kinds:
        if kind not in (ATTENTION, LINEAR):
            raise ValueError(f"layer_types {shown(kind)} is not known; its cache cannot be counted")
    return kinds


def _every(layers: int, period: int, offset: int) -> list[str]:
    return [ATTENTION if n % period == offset else LINEAR for n in range(layers)]


def qwen_kinds(fields: Fields) -> list[str]:
    """The kind of each layer of Qwen3-Next and Qwen3.5."""
    layers, every = (
        fields.integer("num_hidden_layers"),
        fields.integer("full_attention_interval", default=4),
    )
    return _named(fields, layers) or _every(layers, every, every - 1)


def jamba_kinds(fields: Fields) -> list[str]:
    """The kind of each layer of Jamba."""
    layers, period = fields.integer("num_hidden_layers"), fields.integer("attn_layer_period")
    return _named(fields, layers) or _every(layers, period, fields.integer("attn_layer_offset", least=0))


def granite_kinds(fields: Fields) -> list[str]:
    """The kind of each layer of Granite 4."""
    layers = fields.integer("num_hidden_layers")
    kinds = _named(fields, layers)
    if kinds is None:
        raise ValueError("field 'layer_types' is missing: it says which layers have K and V")
    return kinds


_NEMOTRON = {"M": LINEAR, "*": ATTENTION, "-": "mlp", "E": "moe"}
_LONG = {"mamba": LINEAR, "attention": ATTENTION} | {kind: kind for kind in _NEMOTRON.values()}


def nemotron_kinds(fields: Fields) -> list[str]:
    """The kind of each layer of Nemotron-H, which has a mixer or an MLP."""
    named, pattern = fields.raw.get("layers_block_type"), fields.raw.get("hybrid_override_pattern")
    known, kinds = (_NEMOTRON, pattern) if named is None else (_LONG, named)
    if not isinstance(kinds, str if known is _NEMOTRON else list) or not kinds:
        raise ValueError(f"hybrid_override_pattern must name the layers, not {shown(kinds)}")
    if len(kinds) > most("num_hidden_layers"):
        raise ValueError(f"hybrid_override_pattern names {len(kinds):,} layers, more than there may be")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"hybrid_override_pattern {shown(kind)} is not a kind of layer")
    return [known[kind] for kind in kinds]


class _Mamba(NamedTuple):
    """Weights of a Mamba mixer, and elements of its state."""

    weights: int
    state: int


def _mamba1(fields: Fields, hidden: int) -> _Mamba:
    inner = fields.integer("mamba_expand") * hidden
    state, kernel = fields.integer("mamba_d_state"), fields.integer("mamba_d_conv")
    rank = fields.raw.get("mamba_dt_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else fields.integer("mamba_dt_rank")
    weights = inner * (state + 1 + kernel + fields.flag("mamba_conv_bias", True))
    weights += 3 * hidden * inner + inner * (rank + 2 * state) + (rank + 1) * inner + rank + 2 * state
    weights += fields.flag("mamba_proj_bias", False) * (2 * inner + hidden)
    return _Mamba(weights, inner * (state + kernel))


def _mamba2(
    fields: Fields, hidden: int, inner: int, *, norm: bool, biases: tuple[str, str], conv_bias: str
) -> _Mamba:
    heads = fields.integer("mamba_n_heads", "mamba_num_heads")
    state = fields.integer("mamba_d_state", "ssm_state_size")
    kernel = fields.integer("mamba_d_conv", "conv_kernel")
    channels = inner + 2 * fields.integer("mamba_n_groups", "n_groups") * state
    projected = inner + channels + heads
    weights = hidden * projected + channels * (kernel + fields.flag(conv_bias, True)) + 3 * heads
    weights += norm * inner + inner * hidden
    weights += fields.flag(biases[0], False) * projected + fields.flag(biases[1], False) * hidden
    return _Mamba(weights, inner * state + channels * kernel)


def _of_granite(fields: Fields) -> _Mamba:
    hidden = fields.integer("hidden_size")
    inner = fields.integer("mamba_expand") * hidden
    biases = ("mamba_proj_bias", "mamba_proj_bias")
    return _mamba2(fields, hidden, inner, norm=True, biases=biases, conv_bias="mamba_conv_bias")


def _of_falcon(fields: Fields) -> _Mamba:
    hidden = fields.integer("hidden_size")
    inner = fields.optional("mamba_d_ssm") or fields.integer("mamba_expand") * hidden
    norm, biases = fields.flag("mamba_rms_norm", False), ("mamba_proj_bias", "projectors_bias")
    return _mamba2(fields, hidden, inner, norm=norm, biases=biases, conv_bias="mamba_conv_bias")


def _of_nemotron(fields: Fields) -> _Mamba:
    inner = fields.integer("mamba_num_heads") * fields.integer("mamba_head_dim")
    biases, hidden = ("use_bias", "use_bias"), fields.integer("hidden_size")
    return _mamba2(fields, hidden, inner, norm=True, biases=biases, conv_bias="use_conv_bias")


def jamba(fields: Fields, size: Sizes) -> list[Layer]:
    """Attention or Mamba, before an MLP or experts."""
    hidden, mamba, attention = size.hidden, _mamba1(fields, size.hidden).weights, attention_weights(size)
    one, count = 3 * hidden * fields.integer("intermediate_size"), fields.integer("num_experts")
    chosen = fields.integer("num_experts_per_tok")
    period, offset = (
        fields.integer("expert_layer_period"),
        fields.integer("expert_layer_offset", least=0),
    )
    found = []
    for n, kind in enumerate(jamba_kinds(fields)):
        rest = (attention if kind == ATTENTION else mamba) + 2 * hidden
        sparse = count > 1 and n % period == offset
        found.append(experts(one, count, chosen, rest + hidden * count) if sparse else Layer(rest + one))
    return found


def jamba_state(fields: Fields) -> int:
    """Elements of the states of one sequence."""
    return jamba_kinds(fields).count(LINEAR) * _mamba1(fields, fields.integer("hidden_size")).state


def granite(fields: Fields, size: Sizes) -> list[Layer]:
    """Attention or Mamba 2, before a shared MLP and experts, if there are any."""
    hidden, biased = size.hidden, fields.flag("attention_bias", False)
    attention = attention_weights(size, qkv_bias=biased, out_bias=biased)
    kinds, count = granite_kinds(fields), fields.integer("num_local_experts", least=0)
    mamba = _of_granite(fields).weights if LINEAR in kinds else 0
    mlp = 3 * hidden * fields.integer("shared_intermediate_size") + 2 * hidden
    one = 3 * hidden * fields.integer("intermediate_size") if count else 0
    chosen = fields.integer("num_experts_per_tok", least=0) if count else 0
    rests = [mlp + (attention if kind == ATTENTION else mamba) for kind in kinds]
    return [experts(one, count, chosen, rest + hidden * count) for rest in rests]


def granite_state(fields: Fields) -> int:
    """Elements of the states of one sequence."""
    linear = granite_kinds(fields).count(LINEAR)
    return linear * _of_granite(fields).state if linear else 0


def falcon_h1(fields: Fields, size: Sizes) -> list[Layer]:
    """Attention beside Mamba 2, before an MLP."""
    hidden, width = size.hidden, fields.integer("intermediate_size")
    biased = fields.flag("attention_bias", False)
    mlp = 3 * hidden * width + fields.flag("mlp_bias", False) * (2 * width + hidden)
    attention = attention_weights(size, qkv_bias=biased, out_bias=biased)
    return [Layer(attention + _of_falcon(fields).weights + mlp + 2 * hidden)] * size.layers


def falcon_state(fields: Fields) -> int:
    """Elements of the states of one sequence, which all layers have beside K and V."""
    return fields.integer("num_hidden_layers") * _of_falcon(fields).state


def nemotron_h(fields: Fields, size: Sizes) -> list[Layer]:
    """Attention, Mamba 2, an MLP or experts, each a layer of its own."""
    hidden, biased = size.hidden, fields.flag("mlp_bias", False)
    kinds = nemotron_kinds(fields)
    of_kind = {ATTENTION: Layer(hidden + attention_weights(size))}
    if LINEAR in kinds:
        of_kind[LINEAR] = Layer(hidden + _of_nemotron(fields).weights)
    if "mlp" in kinds:
        width = fields.integer("intermediate_size")
        of_kind["mlp"] = Layer(hidden + 2 * hidden * width + biased * (width + hidden))
    if "moe" in kinds:
        latent, wide = fields.optional("moe_latent_size"), fields.integer("moe_intermediate_size")
        count, shared = (
            fields.integer("n_routed_experts"),
            fields.integer("moe_shared_expert_intermediate_size"),
        )
        rest = hidden + hidden * count + count + 2 * hidden * shared + biased * (shared + hidden)
        rest += 0 if latent is None else 2 * hidden * latent + biased * (latent + hidden)
        chosen = fields.integer("num_experts_per_tok")
        of_kind["moe"] = experts(2 * (latent or hidden) * wide, count, chosen, rest)
    return [of_kind[kind] for kind in kinds]


def nemotron_state(fields: Fields) -> int:
    """Elements of the states of one sequence."""
    linear = nemotron_kinds(fields).count(LINEAR)
    return linear * _of_nemotron(fields).state if linear else 0
