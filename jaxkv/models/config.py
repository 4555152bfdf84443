"""The static sizes and options of a decoder, and how to read them from a `config.json`."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from jaxkv.arguments import whole
from jaxkv.checkpoints.hf_folder import read_json, shown, with_defaults
from jaxkv.config import CacheConfig
from jaxkv.models.config_checks import (
    Activation,
    Norm,
    Norms,
    QKNorm,
    check_choices,
    check_layers,
    check_numbers,
    checked_integers,
)
from jaxkv.models.experts import Experts
from jaxkv.models.families.reading import config_arguments
from jaxkv.models.families.registry import family_of, text_part
from jaxkv.rope import DynamicScaling, Rope, RopePairing, RopeScaling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The static sizes and options of one model; hashable, so it can be a static argument.

    Attributes:
      vocab_size: tokens of the vocabulary.
      hidden_size: width of the residual stream, in features.
      num_layers: transformer blocks.
      num_q_heads: query heads.
      num_kv_heads: key and value heads; divides `num_q_heads`.
      head_dim: features of one head; even.
      intermediate_size: width of the MLP, in features.
      rms_norm_eps: added to the mean square before its root, in norms of either kind.
      rope_theta: the base of the rotary frequencies.
      rope_pairing: which features are rotated as a pair; see `jaxkv.rope.rotate`.
      rope_scaling: how the frequencies are scaled, or None; dynamic and longrope depend on `max_context`.
      rotary_features: features of a head that are rotated, the first ones; even. None is all.
      window_rope_theta: the base in layers with a window, unscaled; None is as in the others.
      norms: of attention and MLP: of what they read, of what they add to the residual stream, or of both.
      norm: "rms" divides by the root mean square; "layer" subtracts the mean first.
      norm_bias: whether norms add a bias.
      qk_norm: whether queries and keys are normalized before they are rotated: "heads", each head by itself;
        "all", all heads of a token together; None, not at all.
      qkv_bias: whether the Q, K and V projections add a bias (Qwen2).
      out_bias: whether the projection after attention adds a bias.
      sinks: whether each query head has a logit that takes part in its softmax (gpt-oss).
      parallel: whether attention and MLP read the same norm of the residual stream.
      gated: whether the MLP has a gate.
      mlp_bias: whether the MLP's projections add biases.
      activation: of the MLP's gate, or of the MLP without one; "gelu_tanh" is GELU's approximation by tanh,
        "clipped_swiglu" gpt-oss's, by the next two.
      swiglu_limit: limits the gate from above, and what it multiplies from both sides.
      swiglu_alpha: factor of the gate in its sigmoid.
      experts: mixtures of experts in place of the MLP; None without.
      dense_layers: layers that have the MLP nevertheless, in order.
      no_rope_layers: layers that do not rotate queries and keys, in order.
      embedding_multiplier: factor of the embeddings.
      residual_multiplier: factor of what attention and MLP add to the residual stream.
      logit_multiplier: factor of the logits.
      query_scale: factor of the attention scores; None is `1 / sqrt(head_dim)`.
      attention_softcap: limits attention scores, as in `jaxkv.attend`; None limits nothing.
      logit_softcap: limits logits in the same way.
      tied_embeddings: whether the output projection is the embedding table.
      window: latest tokens that a token attends to, itself included; None is all.
      full_attention_layers: layers that attend to all tokens despite the window, in order.
      max_context: tokens of context that the model supports, including rotary scaling.

    Raises:
      ValueError: for a field out of range, naming it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_pairing: RopePairing = "half"
    rope_scaling: RopeScaling | None = None
    rotary_features: int | None = None
    window_rope_theta: float | None = None
    norms: Norms = "before"
    norm: Norm = "rms"
    norm_bias: bool = False
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    parallel: bool = False
    gated: bool = True
    mlp_bias: bool = False
    activation: Activation = "silu"
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    no_rope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    max_context: int

    def __post_init__(self) -> None:
        for name, number in checked_integers(self).items():
            object.__setattr__(self, name, number)
        check_numbers(self)
        check_choices(self)
        check_layers(self)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, in tokens; None is all."""
        full = set(self.full_attention_layers)
        return tuple(None if layer in full else self.window for layer in range(self.num_layers))

    @property
    def q_features(self) -> int:
        """Features of all query heads together."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Features of all key heads together; the same for all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """How each layer's queries and keys are rotated by their positions; None is not at all."""
        features, pairing = self.rotary_features or self.head_dim, self.rope_pairing
        full = Rope.of(features, self.rope_theta, self.rope_scaling, pairing, self.max_context)
        theta = self.window_rope_theta
        near = full if theta is None else Rope.of(features, theta, pairing=pairing)
        without = set(self.no_rope_layers)
        return tuple(
            None if layer in without else full if window is None else near
            for layer, window in enumerate(self.windows)
        )

    @property
    def rope(self) -> Rope | None:
        """How the keys of every layer are rotated by their positions; None if layers differ or do not."""
        ropes = set(self.ropes)
        return ropes.pop() if len(ropes) == 1 else None

    def cache_config(self, **options: Any) -> CacheConfig:
        """A `jaxkv.CacheConfig` for this model; `options` are its other arguments.

        Raises:
          ValueError: as `CacheConfig` does.
        """
        sizes = dict(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            layer_windows=self.windows,
        )
        return CacheConfig(**{**sizes, **options})  # type: ignore[arg-type]

    def for_context(self, max_context: int | None) -> Self:
        """The same model for contexts of at most `max_context` tokens; None changes nothing.

        Dynamic scaling reaches beyond the model's own context, up to its factor times as far.

        Raises:
          ValueError: for more than the model supports.
        """
        if max_context is None:
            return self
        scaling, most, tokens = self.rope_scaling, self.max_context, whole(max_context)
        if isinstance(scaling, DynamicScaling):
            most = max(most, int(scaling.factor * scaling.original_max_position))
        if tokens is None or not 1 <= tokens <= most:
            raise ValueError(f"max_context must be an integer from 1 to {most}, not {shown(max_context)}")
        return dataclasses.replace(self, max_context=tokens)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | PathLike[str]) -> Self:
        """Reads a Hugging Face `config.json`, given as its contents, its path or its folder.

        Raises:
          ValueError: if the file cannot be read, the architecture or a feature is not supported, or a field
            is missing or out of range; the message names it.
        """
        raw = source if isinstance(source, Mapping) else read_json(Path(source))
        text = with_defaults(text_part(raw))
        return cls(**config_arguments(text, family_of(text)))
