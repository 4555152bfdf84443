"""Parses a policy from text: `sliding-window:1024,sinks=4`."""

from dataclasses import MISSING, fields
from typing import Any

from jaxkv import policies
from jaxkv.policies.base import Policy
from jaxkv.rope import Rope

POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in vars(policies).values()
    if isinstance(kind, type) and issubclass(kind, Policy) and kind.name is not None
}
# Short names of settings.
_SHORT = {"observe": "observe_last"}


def parse_policy(text: str, rope: Rope | None = None) -> Policy:
    """A policy from its name, its window or budget in tokens, and other settings.

    Args:
      text: `NAME:TOKENS[,SETTING=VALUE...]`. `recent` defaults to 7/8 of the budget; `observe` to 32
        tokens, or half the budget if that is less.
      rope: how the model rotates its keys, for `positions=cache`.

    Raises:
      ValueError: for an unknown name or setting, listing the known ones.

    Example:
      >>> parse_policy("sliding-window:1024,sinks=4")
      SlidingWindow(window=1024, sinks=4, positions='original', rope=None)
      >>> parse_policy("heavy-hitter:512,recent=64").recent
      64
    """
    name, colon, rest = text.strip().partition(":")
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is not one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    tokens, *others = [part.strip() for part in rest.split(",")]
    if not colon or not tokens:
        raise ValueError(f"policy {text!r} needs a number of tokens: {name}:TOKENS")
    first, *known = [field.name for field in fields(kind)]
    settings: dict[str, Any] = {first: _number(first, tokens)}
    for part in others:
        setting, equals, value = (piece.strip() for piece in part.partition("="))
        setting = _SHORT.get(setting, setting)
        if not equals or setting == "rope" or setting not in known or setting in settings:
            allowed = ", ".join(f"{known_name}=" for known_name in known if known_name != "rope")
            raise ValueError(f"policy {text!r}: {part!r} is not one of {allowed} once each")
        settings[setting] = value if setting == "positions" else _number(setting, value)
    if settings.get("positions") == "cache":
        settings["rope"] = rope
    for field in fields(kind):
        if field.name == "recent" and field.default is MISSING:
            settings.setdefault("recent", settings["budget"] * 7 // 8)
        if field.name == "observe_last":
            settings.setdefault("observe_last", max(1, min(field.default, settings["budget"] // 2)))
    return kind(**settings)


def _number(name: str, text: str) -> int | float:
    kind = float if name == "threshold" else int
    try:
        return kind(text)
    except ValueError:
        kinds = {int: "an integer", float: "a number"}
        raise ValueError(f"{name}={text[:40]!r} is not {kinds[kind]}") from None
