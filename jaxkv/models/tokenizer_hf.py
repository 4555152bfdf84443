"""Builds the tokenizer of a Hugging Face folder from `tokenizer.json` and the files beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxkv.checkpoints.hf_folder import read_json
from jaxkv.errors import ModelLoadError
from jaxkv.models.tokenizer import Tokenizer

# Tokens for chat templates, in addition to bos and eos.
_NAMED = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def hf_tokenizer(folder: Path) -> Tokenizer:
    """Builds the tokenizer of a folder.

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
    if "added_tokens_decoder" not in settings:
        # In older folders this file names the special tokens, and takes precedence.
        settings |= _read_json(folder / "special_tokens_map.json")
    bos, eos = (_token_text(settings.get(f"{name}_token")) for name in ("bos", "eos"))
    stops = {inner.token_to_id(eos)} if eos else set()
    for name in ("config.json", "generation_config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        stops.update(ids if isinstance(ids, list) else [ids])
    return Tokenizer(
        inner,
        stop_tokens={token for token in stops if isinstance(token, int)},
        chat_template=_template_files(folder) or _templates(settings, folder / "tokenizer_config.json"),
        bos=bos,
        eos=eos,
        special={name: text for name in _NAMED if (text := _token_text(settings.get(name)))},
    )


def _template_files(folder: Path) -> dict[str, str]:
    """Templates in separate files, which take precedence over those in the settings."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    texts = {}
    for name, path in paths.items():
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelLoadError(f"{path}: is not UTF-8 text") from None
    return texts


def _templates(settings: Mapping[str, Any], path: Path) -> str | dict[str, str] | None:
    """One template, or several by name."""
    found = settings.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, Mapping):
        found = [{"name": name, "template": template} for name, template in found.items()]
    if not isinstance(found, list):
        raise ModelLoadError(
            f"{path}: chat_template must be a text or a list of named templates, not {found!r:.100}"
        )
    named = {}
    for number, item in enumerate(found):
        pair = [item.get(key) for key in ("name", "template")] if isinstance(item, Mapping) else []
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ModelLoadError(
                f"{path}: chat_template[{number}] must have a text 'name' and a text 'template', "
                f"not {item!r:.100}"
            )
        named[pair[0]] = pair[1]
    return named or None


def _token_text(token: Any) -> str:
    """The text of a special token, which is a string or an object with the field `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise ModelLoadError(str(error)) from None
