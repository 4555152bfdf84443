"""What the two formats of checkpoints call a model's tensors; families say where theirs differ."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """A format's name for each parameter; tensors of several names are joined along the outer dimension.

    Attributes:
      layer: what the names of a layer's tensors begin with.
      expert_gate_up, expert_down: with "{expert}" a tensor for each expert, else one for all.
      norm_offset: added to the weights of every norm; Gemma's checkpoints store them less one.
    """

    embedding: str
    final_norm: str
    final_norm_bias: str
    unembedding: str
    layer: str
    attention_norm: str
    attention_norm_bias: str
    qkv: tuple[str, ...]
    qkv_bias: tuple[str, ...]
    q_norm: str
    k_norm: str
    out: str
    out_bias: str
    sinks: str
    attention_post_norm: str
    mlp_norm: str
    mlp_norm_bias: str
    gate_up: tuple[str, ...]
    gate_up_bias: tuple[str, ...]
    down: str
    down_bias: str
    router: str
    router_bias: str
    expert_gate_up: tuple[str, ...]
    expert_gate_up_bias: tuple[str, ...]
    expert_down: str
    expert_down_bias: str
    shared_gate_up: tuple[str, ...]
    shared_down: str
    shared_gate: str
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
    final_norm_bias="model.norm.bias",
    unembedding="lm_head.weight",
    layer="model.layers.{layer}.",
    attention_norm="input_layernorm.weight",
    attention_norm_bias="input_layernorm.bias",
    qkv=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    qkv_bias=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    q_norm="self_attn.q_norm.weight",
    k_norm="self_attn.k_norm.weight",
    out="self_attn.o_proj.weight",
    out_bias="self_attn.o_proj.bias",
    sinks="self_attn.sinks",
    # Without a norm after attention, this name is of the norm before the MLP.
    attention_post_norm="post_attention_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    mlp_norm_bias="post_attention_layernorm.bias",
    gate_up=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    gate_up_bias=("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    down="mlp.down_proj.weight",
    down_bias="mlp.down_proj.bias",
    router="mlp.gate.weight",
    router_bias="mlp.gate.bias",
    expert_gate_up=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    expert_gate_up_bias=("mlp.experts.{expert}.gate_proj.bias", "mlp.experts.{expert}.up_proj.bias"),
    expert_down="mlp.experts.{expert}.down_proj.weight",
    expert_down_bias="mlp.experts.{expert}.down_proj.bias",
    shared_gate_up=("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    shared_down="mlp.shared_expert.down_proj.weight",
    shared_gate="mlp.shared_expert_gate.weight",
    mlp_post_norm="post_feedforward_layernorm.weight",
)

GGUF_NAMES = TensorNames(
    embedding="token_embd.weight",
    final_norm="output_norm.weight",
    final_norm_bias="output_norm.bias",
    unembedding="output.weight",
    layer="blk.{layer}.",
    attention_norm="attn_norm.weight",
    attention_norm_bias="attn_norm.bias",
    qkv=("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    qkv_bias=("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    q_norm="attn_q_norm.weight",
    k_norm="attn_k_norm.weight",
    out="attn_output.weight",
    out_bias="attn_output.bias",
    sinks="attn_sinks.weight",
    attention_post_norm="post_attention_norm.weight",
    mlp_norm="ffn_norm.weight",
    mlp_norm_bias="ffn_norm.bias",
    gate_up=("ffn_gate.weight", "ffn_up.weight"),
    gate_up_bias=("ffn_gate.bias", "ffn_up.bias"),
    down="ffn_down.weight",
    down_bias="ffn_down.bias",
    router="ffn_gate_inp.weight",
    router_bias="ffn_gate_inp.bias",
    expert_gate_up=("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    expert_gate_up_bias=("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    expert_down="ffn_down_exps.weight",
    expert_down_bias="ffn_down_exps.bias",
    shared_gate_up=("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    shared_down="ffn_down_shexp.weight",
    shared_gate="ffn_gate_inp_shexp.weight",
    mlp_post_norm="post_ffw_norm.weight",
)
