"""Text to token ids and back, chat templates, and text that arrives token by token.

The work is done by the `tokenizers` package; this file gives it one face for both kinds of file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from jaxkv.models.errors import ModelLoadError, TokenizerError

# Tokens that end a turn in the chat formats of the supported models; a file's own end-of-sequence
# token is often only one of them.
END_OF_TURN = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")

Messages = Sequence[Mapping[str, str]]


class Tokenizer:
    """One model's tokenizer.

    Args:
      inner: turns text into ids and back.
      stop_tokens: ids after which a text is complete; those of `END_OF_TURN` are added.
      chat_template: a Jinja template, or None for a model that has none.
      bos: text of the token that a chat template may put first.
      eos: text of the token that a chat template may put last.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        stop_tokens: Iterable[int] = (),
        chat_template: str | None = None,
        bos: str = "",
        eos: str = "",
    ):
        named = (inner.token_to_id(text) for text in END_OF_TURN)
        self.inner = inner
        self.stop_tokens = frozenset(stop_tokens) | {token for token in named if token is not None}
        self.chat_template = chat_template
        self.bos, self.eos = bos, eos

    @property
    def vocab_size(self) -> int:
        """Ids in use, special ones included; a model's table may have more rows."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text; special tokens written out in it are taken as such.
          add_special: whether to put the model's own first token before it, where it has one.
              Not for the output of `chat`, whose template does that.

        Raises:
          TokenizerError: for text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text is not valid UTF-8 at character {error.start}") from None
        return self.inner.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; half a character becomes U+FFFD.

        Raises:
          TokenizerError: for an id that no vocabulary can have.
        """
        for token in ids:
            if not 0 <= int(token) < 2**32:
                raise TokenizerError(f"token id {token} is out of range")
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def stream(self) -> "TextStream":
        """A decoder for tokens that arrive a few at a time."""
        return TextStream(self)

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Args:
          messages: each with a `role` ("system", "user" or "assistant") and its `content`.
          add_generation_prompt: whether to end with the start of the assistant's answer.

        Raises:
          TokenizerError: when the model has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError("this model has no chat template; give it plain text")
        for place, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise TokenizerError(f"message {place} must be a role and its content, not {message!r}")
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise TokenizerError(f"message {place} needs a text {key!r}")
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
            )
        except Exception as error:  # a template fails like any program
            line = " ".join(str(error).split())
            raise TokenizerError(f"the chat template refused the messages: {line}") from None

    def encode_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; raises as `chat` and `encode` do."""
        text = self.chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special=False)

    @classmethod
    def from_hf(cls, folder: Path) -> "Tokenizer":
        """Reads `tokenizer.json` and what is beside it.

        Raises:
          ModelLoadError: naming the file that is missing or damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(f"{path}: is missing")
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises bare Exception
            raise ModelLoadError(f"{path}: is not a tokenizer: {error}") from None
        settings = _read_json(folder / "tokenizer_config.json")
        bos, eos = (_token_text(settings.get(f"{name}_token")) for name in ("bos", "eos"))
        stops = {inner.token_to_id(eos)} if eos else set()
        for name in ("config.json", "generation_config.json"):
            ids = _read_json(folder / name).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        return cls(
            inner,
            stop_tokens={token for token in stops if isinstance(token, int)},
            chat_template=_hf_template(folder, settings),
            bos=bos,
            eos=eos,
        )


class TextStream:
    """Text from tokens that arrive a few at a time; a character that is not whole yet waits.

    Example:
      >>> from jaxkv.models import load
      >>> stream = load("smollm2-135m").tokenizer.stream()
      >>> [stream.push([token]) for token in stream.tokenizer.encode("A \u2615!")]
      ['A', '', '', ' \u2615', '!']
    """

    # A character is four bytes at most; so many tokens without the end of one are not text at all.
    _MOST_WAITING = 16

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete, perhaps empty."""
        out = []
        for token in ids:
            self._waiting.append(int(token))
            text = self._text()
            if text.endswith("\ufffd") and len(self._waiting) < self._MOST_WAITING:
                continue
            out.append(text)
            # One shown token stays as context: some tokenizers space a token by what precedes it.
            self._shown, self._waiting = self._waiting, []
        return "".join(out)

    def flush(self) -> str:
        """The text of tokens still waiting; the stream is then at its start again."""
        text = self._text() if self._waiting else ""
        self._shown, self._waiting = [], []
        return text

    def _text(self) -> str:
        before = self.tokenizer.decode(self._shown)
        return self.tokenizer.decode(self._shown + self._waiting)[len(before) :]


def _environment() -> jinja2.Environment:
    # A template comes with a model file: it must not reach Python's objects.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment


def _hf_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelLoadError(f"{path}: is not UTF-8 text") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str:
    """A special token as older and newer files write it: its text, or an object around it."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelLoadError(f"{path}: is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object")
    return raw
