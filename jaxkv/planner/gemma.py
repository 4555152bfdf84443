"""Layers of Gemma 3n and Gemma 4, which share K and V and differ in size."""

from collections.abc import Mapping

from jaxkv.checkpoints.fields import Fields
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.planner.experts import experts
from jaxkv.planner.weights import Layer, Sizes, layer_widths


def _kinds(fields: Fields, layers: int, every: int) -> list[str]:
    """The kind of each layer; the last has full attention."""
    kinds = fields.layer_types(layers)
    if kinds is None:
        kinds = ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(layers)]
        return [*kinds[:-1], "full_attention"] if every == 6 else kinds
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types {shown(kind)} is not known; its cache cannot be counted")
    return kinds


def _own(fields: Fields, layers: int) -> int:
    """Layers with K and V of their own; later ones share those of earlier ones."""
    shared = fields.integer("num_kv_shared_layers", default=0, least=0)
    if shared >= layers:
        raise ValueError(f"num_kv_shared_layers={shared} must be less than num_hidden_layers={layers}")
    return layers - shared


def all_but_every(pattern: int):
    """A window in all layers except every `pattern`-th, of those with K and V of their own."""

    def windows(fields: Fields, layers: int) -> list[int | None]:
        kinds = _kinds(fields, layers, pattern)[: _own(fields, layers)]
        if "sliding_attention" not in kinds:
            return [None] * len(kinds)
        window = fields.integer("sliding_window")
        return [window if kind == "sliding_attention" else None for kind in kinds]

    return windows


def _attention(hidden: int, q: int, kv: int, head_dim: int, *, shares: bool, biased: bool) -> int:
    """Weights of attention, with norms of Q and K; of Q only if it shares K and V."""
    inputs = q if shares else q + 2 * kv
    return hidden * (inputs + q) + head_dim * (1 if shares else 2) + biased * (inputs + hidden)


def gemma3n(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers with AltUp, LAuReL and an input of their own."""
    hidden, width = size.hidden, fields.integer("hidden_size_per_layer_input")
    inputs, own = fields.integer("altup_num_inputs"), _own(fields, size.layers)
    biased = fields.flag("attention_bias", False)
    beside = hidden + inputs**2 + inputs**3 + inputs * hidden + hidden  # AltUp
    beside += 2 * hidden * fields.integer("laurel_rank") + hidden
    beside += 2 * hidden * width + hidden + 4 * hidden
    found = []
    for n, wide in enumerate(layer_widths(fields, size.layers)):
        attention = _attention(
            hidden,
            size.q_heads * size.head_dim,
            size.kv_heads * size.head_dim,
            size.head_dim,
            shares=n >= own,
            biased=biased,
        )
        found.append(Layer(attention + beside + 3 * hidden * wide))
    return found


def _per_layer(fields: Fields, size: Sizes, width: int) -> tuple[int, int]:
    """Weights of the embedding of each layer, and of what projects to it."""
    rows = fields.integer("vocab_size_per_layer_input", default=fields.integer("vocab_size"))
    features = size.layers * width
    return rows * features, size.hidden * features + width


def extra_of_gemma3n(fields: Fields, size: Sizes) -> tuple[int, int]:
    """Weights beside layers: embeddings of each layer, projections of AltUp."""
    embeddings, rest = _per_layer(fields, size, fields.integer("hidden_size_per_layer_input"))
    return embeddings, rest + 2 * (fields.integer("altup_num_inputs") - 1) * size.hidden**2


def extra_of_gemma4(fields: Fields, size: Sizes) -> tuple[int, int]:
    """Weights beside layers: embeddings of each layer, if the model has them."""
    width = fields.integer("hidden_size_per_layer_input", least=0)
    return _per_layer(fields, size, width) if width else (0, 0)


def _of_each(fields: Fields, size: Sizes) -> list[tuple[int, int]]:
    """KV heads and head_dim of every layer of Gemma 4; those of full attention have their own."""
    wide = fields.integer("global_head_dim", default=512)
    shares = fields.flag("attention_k_eq_v", False)
    heads = fields.integer("num_global_key_value_heads", default=size.kv_heads) if shares else size.kv_heads
    said = fields.raw.get("per_layer_config")
    kinds = _kinds(fields, size.layers, 6)
    if said is None:
        return [(heads, wide) if kind == "full_attention" else size[3:] for kind in kinds]
    if not isinstance(said, Mapping):
        raise ValueError(f"per_layer_config must be an object, not {shown(said)}")
    found = [size[3:]] * size.layers
    for layer, options in said.items():
        if not str(layer).isdecimal() or len(str(layer)) > 6 or int(layer) >= size.layers:
            raise ValueError(f"per_layer_config {shown(layer)} is not a layer")
        if not isinstance(options, Mapping):
            raise ValueError(f"per_layer_config's layers must be objects, not {shown(options)}")
        own = Fields(options)
        found[int(layer)] = (
            own.integer("num_key_value_heads", default=size.kv_heads),
            own.integer("head_dim", default=size.head_dim),
        )
    return found


def layer_sizes(fields: Fields, size: Sizes) -> list[tuple[int, int]]:
    """KV heads and head_dim of each layer of Gemma 4 with K and V of its own."""
    found = _of_each(fields, size)[: _own(fields, size.layers)]
    for heads, _ in found:
        if size.q_heads % heads:
            raise ValueError(f"num_key_value_heads={heads} must divide num_attention_heads={size.q_heads}")
    return found


def gemma4(fields: Fields, size: Sizes) -> list[Layer]:
    """Layers with windows, or full attention of another size; experts beside the MLP in some models."""
    hidden, own, biased = size.hidden, _own(fields, size.layers), fields.flag("attention_bias", False)
    width = fields.integer("hidden_size_per_layer_input", least=0)
    double = fields.flag("use_double_wide_mlp", False)
    same = fields.flag("attention_k_eq_v", False)
    rest = 4 * hidden + (2 * hidden * width + hidden if width else 0)
    wide, found = fields.integer("intermediate_size"), []
    kinds = _kinds(fields, size.layers, 6)
    for n, (heads, head_dim) in enumerate(_of_each(fields, size)):
        kv, shares = heads * head_dim, n >= own
        total = _attention(hidden, size.q_heads * head_dim, kv, head_dim, shares=shares, biased=biased)
        if same and kinds[n] == "full_attention" and not shares:
            total -= kv * (hidden + biased)
        total += rest + 3 * hidden * wide * (2 if double and shares else 1)
        found.append(_with_experts(fields, hidden, total))
    return found


def _with_experts(fields: Fields, hidden: int, total: int) -> Layer:
    if not fields.flag("enable_moe_block", False):
        return Layer(total)
    count, chosen = fields.integer("num_experts"), fields.integer("top_k_experts")
    one = 3 * hidden * fields.integer("moe_intermediate_size")
    # The router with its scales, and three norms.
    return experts(one, count, chosen, total + hidden * count + hidden + count + 3 * hidden)
