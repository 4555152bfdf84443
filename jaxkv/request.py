"""Checks the arguments of `generate` before anything is computed."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxkv.arguments import integer
from jaxkv.causal_lm import CausalLM, accepts, takes_mass
from jaxkv.policies import Policy
from jaxkv.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of `generate`, with one value per prompt where prompts may differ.

    Attributes:
      prompts: token ids of each.
      limits: most new tokens of each.
      samplings: how its tokens are chosen.
      stop_tokens: ids that end a sequence, sorted.
      num_samples: continuations of each prompt.
      prefill_chunk: most tokens per prefill step.
      block: decode steps between two calls of `on_tokens`.
    """

    prompts: list[list[int]]
    limits: list[int]
    samplings: list[Sampling]
    stop_tokens: tuple[int, ...]
    num_samples: int
    prefill_chunk: int
    block: int

    @classmethod
    def of(
        cls,
        prompts: Iterable[Iterable[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        stop_tokens: Iterable[int],
        **counts: int,
    ) -> "Request":
        """Checks and converts the arguments; raises `ValueError` naming the wrong one."""
        try:
            prompts = [list(prompt) for prompt in prompts]
        except TypeError:
            raise ValueError("prompts must be a sequence of sequences of token ids") from None
        ids = [token_ids(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
        if not ids:
            raise ValueError("there are no prompts")
        return cls(
            prompts=ids,
            limits=_limits(max_new_tokens, len(ids)),
            samplings=_samplings(sampling, len(ids)),
            stop_tokens=tuple(sorted(set(token_ids(stop_tokens, "stop_tokens")))),
            **{name: integer(name, value) for name, value in counts.items()},
        )

    def check_vocabulary(self, vocab: int, model: CausalLM) -> None:
        """Raises `ValueError` for a token id beyond the model's vocabulary."""
        for name, ids in (
            *((f"prompt {number}", prompt) for number, prompt in enumerate(self.prompts)),
            ("stop_tokens", self.stop_tokens),
        ):
            if ids and max(ids) >= vocab:
                raise ValueError(
                    f"{name}: token id {max(ids)} is beyond the vocabulary of {type(model).__name__}, which "
                    f"has {vocab} tokens: 0 to {vocab - 1}"
                )


def token_ids(tokens: Iterable[int], name: str) -> list[int]:
    """Token ids as Python integers; raises `ValueError` naming the argument for one that is none."""
    try:
        given = list(tokens)
    except TypeError:
        raise ValueError(f"{name}={tokens!r} must be a sequence of token ids") from None
    ids = []
    for token in given:
        try:
            if isinstance(token, bool):
                raise TypeError
            ids.append(operator.index(token))
        except TypeError:
            raise ValueError(f"{name}: {token!r} is not a token id") from None
        if not 0 <= ids[-1] < 2**31:
            raise ValueError(f"{name}: token id {token} is out of range")
    return ids


def _limits(max_new_tokens: object, count: int) -> list[int]:
    values = _one_each("max_new_tokens", max_new_tokens, count)
    if values is None:
        return [integer("max_new_tokens", max_new_tokens, least=0)] * count
    return [integer(f"max_new_tokens[{nth}]", value, least=0) for nth, value in enumerate(values)]


def _samplings(sampling: object, count: int) -> list[Sampling]:
    if isinstance(sampling, Sampling):
        return [sampling] * count
    values = None if isinstance(sampling, Mapping) else _one_each("sampling", sampling, count)
    for value in [sampling] if values is None else values:
        if not isinstance(value, Sampling):
            raise ValueError(f"sampling={value!r} must be a jaxkv.Sampling, or a sequence of one per prompt")
    return [value for value in values or [] if isinstance(value, Sampling)]


def _one_each(name: str, value: object, count: int) -> list | None:
    """The elements of a sequence of `count` values; None for a single value."""
    try:
        elements = list(value)  # type: ignore[call-overload]
    except TypeError:
        return None
    if isinstance(value, (str, bytes)) or len(elements) != count:
        raise ValueError(
            f"{name} must be one value or one for each of the {count} prompts, not {len(elements)} values"
        )
    return elements


def check_key(key: object) -> None:
    """Raises `ValueError` for a seed, or anything else that is no key. Keys of `PRNGKey` are uint32."""
    dtype, axes = getattr(key, "dtype", None), getattr(key, "ndim", 0)
    is_key = dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == "uint32" and axes == 1)
    )
    if key is not None and not is_key:
        raise ValueError(f"key must be a key such as jax.random.key(0), not {key!r:.60}")


def check_policy(policy: object) -> None:
    """Raises `ValueError` for what is no policy, such as the text that the commands take."""
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(
            f"policy={policy!r:.200} must be a jaxkv.Policy, such as jaxkv.policies.SlidingWindow(1024)"
        )


def check_model(model: CausalLM, policy: Policy | None) -> None:
    """Raises `ValueError` if the model cannot be called as it will be: with `rows`, and `return_mass`."""
    if not accepts(model, "rows"):
        raise ValueError(f"{type(model).__name__} does not accept rows, as jaxkv.CausalLM does")
    if policy is not None and policy.needs_mass and not takes_mass(model):
        raise ValueError(
            f"{type(policy).__name__} ranks tokens by the attention that they received, but "
            f"{type(model).__name__} does not accept return_mass"
        )
