"""Renders chat templates as `transformers` 5.24 does, with the same names, filters and tags, in a sandbox."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxkv.errors import TokenizerError
from jaxkv.models.special_tokens import MARK

Messages: TypeAlias = Sequence[Mapping[str, Any]]

# Names under which a message may have its reasoning, in the order in which templates read them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ESCAPED_MARK = re.compile(rf"(?<!\\)((?:\\\\)*)\\u{ord(MARK):04x}")


def render(template: str, messages: Messages, variables: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Args:
      template: Jinja source.
      messages: plain data, as `plain_messages` returns it.
      variables: the other variables of the template.

    Raises:
      TokenizerError: for a malformed template, or one that refuses the messages, with the reason.
    """
    try:
        return _compiled(template).render(messages=[_reasoning_named(m) for m in messages], **variables)
    except Exception as error:  # a template may raise any error
        line = " ".join(str(error).split())
        raise TokenizerError(f"the chat template refused the messages: {line}") from None


def plain_messages(messages: Messages, clean: Callable[[str], str]) -> list[dict[str, Any]]:
    """Messages as plain data; raises `TokenizerError` naming a malformed one.

    Args:
      messages: each a mapping with a `role`, and a `content` that is text or a list of parts. A message with
        `tool_calls` needs no content, or has None.
      clean: applied to every text.
    """
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(f"message {number} must be a role and its content, not {message!r}")
        if not isinstance(message.get("role"), str):
            raise TokenizerError(f"message {number} needs a text 'role'")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, list | tuple):
            if not all(isinstance(part, Mapping) for part in content):
                raise TokenizerError(f"message {number}: each part of 'content' must be a mapping")
        elif not isinstance(content, str):
            raise TokenizerError(f"message {number} needs a text 'content', or a list of parts")
        plain.append(plain_data(message, clean, f"message {number}"))
    return plain


def plain_data(value: Any, clean: Callable[[str], str], name: str) -> Any:
    """A copy of JSON types only, so that a template cannot reach the methods of other objects.

    Raises:
      TokenizerError: for other types, with the name and the type.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return clean(str.__str__(value))
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, clean, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, clean, name) for item in value]
    raise TokenizerError(
        f"{name} holds a {type(value).__name__}; text, numbers, None, lists and mappings are allowed"
    )


def literal_text(template: str) -> str:
    """The text and string constants of a template, separated by NUL."""
    try:
        parsed = _environment().parse(template)
    except jinja2.TemplateError:
        return ""  # rendering will raise the error
    texts = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
    texts += [node.value for node in parsed.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def _reasoning_named(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message, with its reasoning under each name that templates read."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> jinja2.Environment:
    # Templates come with model files and are not trusted.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its content is plain text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A separate scope: variables set inside are not visible outside.
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    options: dict[str, Any] = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
    # An escaped mark would be read as text.
    return _ESCAPED_MARK.sub(rf"\1{MARK}", text) if ensure_ascii else text
