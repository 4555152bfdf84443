"""What the two formats of checkpoints call a model's tensors; families say where theirs differ."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """A format's name for each parameter; tensors of several names are joined along the outer dimension.

    Attributes:
      layer: what the names of a layer's tensors begin with.
      norm_offset: added to the weights of every norm; Gemma's checkpoints store them less one.
    """

    embedding: str
    final_norm: str
    unembedding: str
    layer: str
    attention_norm: str
    qkv: tuple[str, ...]
    qkv_bias: tuple[str, ...]
    q_norm: str
    k_norm: str
    out: str
    attention_post_norm: str
    mlp_norm: str
    gate_up: tuple[str, ...]
    down: str
    mlp_post_norm: str
    norm_offset: float = 0.0

    def parts(self, parameter: str) -> tuple[str, ...]:
        """Names of the tensors of a parameter of `Decoder`, such as `blocks.3.qkv`."""
        *prefix, last = parameter.split(".")
        names = getattr(self, last)
        names = (names,) if isinstance(names, str) else names
        start = self.layer.format(layer=prefix[1]) if prefix else ""
        return tuple(start + name for name in names)


HF_NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    unembedding="lm_head.weight",
    layer="model.layers.{layer}.",
    attention_norm="input_layernorm.weight",
    qkv=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    qkv_bias=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    q_norm="self_attn.q_norm.weight",
    k_norm="self_attn.k_norm.weight",
    out="self_attn.o_proj.weight",
    # Without a norm after attention, this name is of the norm before the MLP.
    attention_post_norm="post_attention_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    gate_up=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    down="mlp.down_proj.weight",
    mlp_post_norm="post_feedforward_layernorm.weight",
)

GGUF_NAMES = TensorNames(
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    unembedding="output.weight",
    layer="blk.{layer}.",
    attention_norm="attn_norm.weight",
    qkv=("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    qkv_bias=("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    q_norm="attn_q_norm.weight",
    k_norm="attn_k_norm.weight",
    out="attn_output.weight",
    attention_post_norm="post_attention_norm.weight",
    mlp_norm="ffn_norm.weight",
    gate_up=("ffn_gate.weight", "ffn_up.weight"),
    down="ffn_down.weight",
    mlp_post_norm="post_ffw_norm.weight",
)
