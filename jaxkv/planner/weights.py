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


def sizes(fields: Fields, *, latent: bool, kv_heads: int | None = None, layers: int | None = None) -> Sizes:
    """The sizes, by the field names that most configs use or by GPT-2's.

    Args:
      fields: of the config.
      latent: whether a token has one latent vector instead of K and V.
      kv_heads: KV heads where a field of the architecture's own says them.
      layers: layers where a list of the config's names them.
    """
    hidden = fields.integer("hidden_size", "n_embd", "d_model")
    q_heads = fields.integer("num_attention_heads", "n_head", "n_heads")
    if layers is None:
        layers = fields.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if latent:
        # MLA has other head sizes, and ignores `num_key_value_heads`.
        return Sizes(hidden, layers, q_heads, 1, 1)
    if kv_heads is None:
        kv_heads = fields.integer("num_key_value_heads", "num_kv_heads", "n_head_kv", default=q_heads)
    if q_heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={q_heads}")
    if fields.optional("head_dim") is None and hidden % q_heads:
        raise ValueError(
            f"hidden_size={hidden} must be a multiple of num_attention_heads={q_heads} without head_dim"
        )
    head_dim = fields.integer("head_dim", default=hidden // q_heads)
    return Sizes(hidden, layers, q_heads, kv_heads, head_dim)


def one_of_falcon(fields: Fields) -> int | None:
    """1 if all query heads of Falcon share K and V."""
    if fields.flag("new_decoder_architecture", False):
        return None
    return 1 if fields.flag("multi_query", True) else fields.integer("num_attention_heads", "n_head")


def one_of_bigcode(fields: Fields) -> int | None:
    """1 if all query heads of GPT-BigCode share K and V."""
    return 1 if fields.flag("multi_query", True) else None


def one_of_gpt2(fields: Fields) -> int | None:
    """1 if all query heads share K and V, which SantaCoder's GPT-2 says by a name."""
    named = fields.raw.get("attention_head_type")
    if named not in (None, "multihead", "multiquery"):
        raise ValueError(f"attention_head_type {shown(named)} is not known")
    return 1 if named == "multiquery" else None


def one_of_chatglm(fields: Fields) -> int | None:
    """ChatGLM's `multi_query_group_num` holds only with `multi_query_attention`."""
    if fields.flag("multi_query_attention", False):
        return None
    return fields.integer("num_attention_heads")


def attention_weights(size: Sizes, *, qkv_bias: bool = False, out_bias: bool = False) -> int:
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
            Layer(attention_weights(size, qkv_bias=inputs, out_bias=inputs) + mlp + norms * hidden)
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
    return [Layer(attention_weights(size) + 2 * size.hidden * width + 2 * size.hidden)] * size.layers


def stablelm(fields: Fields, size: Sizes) -> list[Layer]:
    norms = 2 if fields.flag("use_parallel_residual", False) else 4
    extra = norm_of_heads(fields, size) if fields.flag("qk_layernorm", False) else 0
    attention = attention_weights(size, qkv_bias=fields.flag("use_qkv_bias", False))
    mlp = 3 * size.hidden * fields.integer("intermediate_size")
    return [Layer(attention + mlp + norms * size.hidden + extra)] * size.layers


def dense(
    norms: int,
    *,
    qkv_bias: bool | None = None,
    bias: tuple[str, bool] = ("attention_bias", False),
    out_bias: tuple[str, bool] | None = None,
    qk_norm: Callable[[Fields, Sizes], int] | None = None,
    mlp_bias: tuple[str, bool] = ("mlp_bias", False),
):
    """Layers with a gated MLP and `norms` weights of norms per feature.

    Args:
      norms: weights per feature.
      qkv_bias: whether the projections of attention's inputs have biases; None takes the field `bias`.
      bias: field and default for all projections of attention.
      out_bias: field and default for the output projection, if it has one of its own.
      qk_norm: weights of the norms of Q and K.
      mlp_bias: field and default for the biases of the MLP.
    """

    def layers(fields: Fields, size: Sizes) -> list[Layer]:
        biased = fields.flag(*bias)
        after = biased and qkv_bias is None if out_bias is None else fields.flag(*out_bias)
        attention = attention_weights(size, qkv_bias=biased if qkv_bias is None else qkv_bias, out_bias=after)
        width = fields.integer("intermediate_size")
        mlp = 3 * size.hidden * width + fields.flag(*mlp_bias) * (2 * width + size.hidden)
        total = attention + mlp + norms * size.hidden + (0 if qk_norm is None else qk_norm(fields, size))
        return [Layer(total)] * size.layers

    return layers


def gpt2(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("n_inner", default=4 * size.hidden)
    attention = attention_weights(size, qkv_bias=True, out_bias=True)
    return [Layer(attention + 2 * hidden * width + width + hidden + 4 * hidden)] * size.layers


def gpt_neox(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, width = size.hidden, fields.integer("intermediate_size")
    biased = fields.flag("attention_bias", True)
    attention = attention_weights(size, qkv_bias=biased, out_bias=biased)
    return [Layer(attention + 2 * hidden * width + width + hidden + 4 * hidden)] * size.layers


def falcon(fields: Fields, size: Sizes) -> list[Layer]:
    hidden, biased = size.hidden, fields.flag("bias", False)
    width = fields.integer("ffn_hidden_size", default=4 * hidden)
    mlp = 2 * hidden * width + biased * (width + hidden)
    # One norm if attention and MLP read the same input, else two; each has a bias.
    one = fields.flag("parallel_attn", True) and not fields.flag("new_decoder_architecture", False)
    norms = (2 if one else 4) * hidden
    return [Layer(attention_weights(size, qkv_bias=biased, out_bias=biased) + mlp + norms)] * size.layers


def biased_inputs(norms: int):
    """`dense` with biases of attention's inputs, and of its output if the config says so."""
    return dense(norms, bias=("attention_bias", True), out_bias=("attention_out_bias", False))


def mlp_width(fields: Fields, hidden: int) -> int:
    """Most MLP features that one token uses, in a dense layer or in all its experts."""
    widths = fields.raw.get("intermediate_size")
    if isinstance(widths, list):
        dense = max(layer_widths(fields, len(widths)))
    else:
        dense = fields.integer("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden)
    one = fields.integer("moe_intermediate_size", default=dense)
    chosen = fields.integer("num_experts_per_tok", "top_k_experts", "moe_k", default=1)
    return max(dense, one * (chosen + fields.integer("n_shared_experts", default=0, least=0)))


def layer_widths(fields: Fields, layers: int) -> list[int]:
    """`intermediate_size` of each layer, where it may be a list.

    Raises:
      ValueError: for a list of another length, or that holds anything but positive integers.
    """
    widths = fields.raw.get("intermediate_size")
    if not isinstance(widths, list):
        return [fields.integer("intermediate_size")] * layers
    if not widths or len(widths) != layers:
        raise ValueError(f"intermediate_size must have {shown(layers)} layers, not {len(widths)}")
    return [Fields({"intermediate_size": width}).integer("intermediate_size") for width in widths]


def mllama_kinds(fields: Fields) -> list[str]:
    """Layers with K and V of the text, or of images."""
    layers = fields.integer("num_hidden_layers")
    cross = fields.raw.get("cross_attention_layers")
    cross = range(3, layers, 5) if cross is None else cross
    if not isinstance(cross, (list, range)) or not all(type(n) is int for n in cross):
        raise ValueError(f"cross_attention_layers must be a list of layers, not {shown(cross)}")
    return ["cross_attention" if n in cross else "full_attention" for n in range(layers)]


def mllama(fields: Fields, size: Sizes) -> list[Layer]:
    """Llama's layers, some of which attend to images instead."""
    own = attention_weights(size) + 3 * size.hidden * fields.integer("intermediate_size") + 2 * size.hidden
    # Norms of Q and K, and two gates.
    cross = own + 2 * size.head_dim + 2
    return [Layer(own if kind == "full_attention" else cross) for kind in mllama_kinds(fields)]
