"""Converts text to token ids and back, and renders conversations; a wrapper of the `tokenizers` package."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jaxkv.errors import TokenizerError
from jaxkv.models.chat_template import Messages, literal_text, plain_data, plain_messages, render
from jaxkv.models.special_tokens import PlainEncoder
from jaxkv.models.text_stream import TextStream as TextStream

# Tokens that end a turn in the chat formats of the supported models. A file often names only one of them as
# its end-of-sequence token.
END_OF_TURN = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)


class Tokenizer:
    """One model's tokenizer.

    Args:
      inner: the tokenizer of the `tokenizers` package.
      stop_tokens: ids after which a text is complete; those of `END_OF_TURN` are added.
      chat_template: a Jinja template; or several by name, where "tool_use" is for conversations with tools
        and "default" for others; or None.
      bos: text of the begin-of-sequence token, for the chat template.
      eos: text of the end-of-sequence token, for the chat template.
      special: texts of other tokens for the chat template, such as "unk_token" and "pad_token".
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        stop_tokens: Iterable[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        bos: str = "",
        eos: str = "",
        special: Mapping[str, str] | None = None,
    ):
        named = (inner.token_to_id(text) for text in END_OF_TURN)
        self.inner = inner
        self.stop_tokens = frozenset(stop_tokens) | {token for token in named if token is not None}
        self._templates = dict(chat_template) if isinstance(chat_template, Mapping) else {}
        self.chat_template = (
            chat_template if isinstance(chat_template, str) else self._templates.get("default")
        )
        self.bos, self.eos = bos, eos
        self._special = dict(special or {})

    @property
    def vocab_size(self) -> int:
        """Number of token ids, including special ones; a model's embedding table may have more rows."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    @cached_property
    def _plain(self) -> PlainEncoder:
        templates = {self.chat_template or "", *self._templates.values()}
        return PlainEncoder(self.inner, "\0".join(literal_text(template) for template in templates))

    def without_added(self, least: int) -> "Tokenizer":
        """The same without added tokens of ids from `least` on; their texts are then text as any other.

        Gemma 3's tokenizer has a token of images that its models of text have no embedding of.
        """
        if all(number < least for number in self.inner.get_added_tokens_decoder()):
            return self
        raw = json.loads(self.inner.to_str())
        raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < least]
        smaller = copy.copy(self)
        smaller.inner = tokenizers.Tokenizer.from_str(json.dumps(raw))
        smaller.stop_tokens = frozenset(token for token in self.stop_tokens if token < least)
        return smaller

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text.
          add_special: whether to prepend the model's begin-of-sequence token, if it has one. Use False
            for the output of `chat`, whose template does that.
          parse_special: whether special tokens written in the text are parsed. Use False for untrusted text,
            which could otherwise end the user's turn and begin the assistant's; special tokens written by
            the chat template are then plain text too.

        Raises:
          TokenizerError: for text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text is not valid UTF-8 at character {error.start}") from None
        if not parse_special:
            return self._plain.encode_plain(text, add_special=add_special)
        return self.inner.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; an incomplete character becomes U+FFFD.

        Raises:
          TokenizerError: for an id that is not an unsigned 32-bit integer.
        """
        return self.inner.decode(self.checked(ids), skip_special_tokens=skip_special)

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Token ids as Python integers; raises as `decode` does."""
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < 2**32:
                raise TokenizerError(f"token id {token} is out of range")
        return tokens

    def stream(self, stop: Iterable[str] = ()) -> TextStream:
        """A decoder for tokens that arrive a few at a time.

        Args:
          stop: texts that end the stream; they and what follows are not returned.

        Raises:
          ValueError: for an empty stop string.
        """
        return TextStream(self, stop)

    def chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation with the chat template, as `transformers` does.

        Args:
          messages: each with a `role` ("system", "user" or "assistant") and its `content`: text, or a list of
            parts for templates that accept one. Templates may read other fields of a message.
          add_generation_prompt: whether to end with the start of the assistant's answer.
          tools: JSON schemas of functions that the model may call, for templates that support tools.
          documents: each with a `title` and a `text`, for templates that support documents.
          **variables: other variables of the template, such as `enable_thinking`.

        Raises:
          TokenizerError: if the model has no chat template, or it refuses the messages.
        """
        given = dict(variables, add_generation_prompt=add_generation_prompt, tools=tools, documents=documents)
        return self._rendered(messages, given, clean=str)

    def encode_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        parse_special: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation; raises as `chat` and `encode` do.

        Args:
          messages, add_generation_prompt, tools, documents, **variables: as for `chat`.
          parse_special: whether special tokens written in messages, tools, documents and variables are
            parsed. If False, only those that the template itself writes are special, as with
            `sanitize_control_tokens=True` in `transformers`.
        """
        given = dict(variables, add_generation_prompt=add_generation_prompt, tools=tools, documents=documents)
        if parse_special:
            return self.encode(self._rendered(messages, given, clean=str), add_special=False)
        text = self._rendered(messages, given, clean=self._plain.mark)
        return self._plain.encode(text, add_special=False)

    def _rendered(self, messages: Messages, given: Mapping[str, Any], clean: Callable[[str], str]) -> str:
        template = self.chat_template
        if given["tools"] is not None:
            template = self._templates.get("tool_use", template)
        if template is None:
            named = f"; it has templates named {', '.join(self._templates)}" if self._templates else ""
            raise TokenizerError(f"this model has no chat template{named}; give it plain text")
        special = {"bos_token": self.bos, "eos_token": self.eos} | self._special
        variables = {name: text for name, text in special.items() if text}
        variables |= {name: plain_data(value, clean, name) for name, value in given.items()}
        return render(template, plain_messages(messages, clean), variables)

    @classmethod
    def from_hf(cls, folder: Path) -> "Tokenizer":
        """Reads `tokenizer.json` and the related files of a folder.

        Raises:
          ModelLoadError: naming the file that is missing or damaged.
        """
        from jaxkv.models.tokenizer_hf import hf_tokenizer

        return hf_tokenizer(folder)
