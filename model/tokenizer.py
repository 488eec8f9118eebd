"""Text to ids and back, with the chat template's fragments. Wraps `tokenizers`; reads and writes Hugging Face's files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from duologue.model.chat import Chat

SPECIAL = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# One token per marker, and a turn ends with the token that stops generation.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Tokenizer:
    """`encode` treats its text as text: a special token written in it stays ordinary characters."""

    def __init__(self, core: tokenizers.Tokenizer, settings: dict[str, Any], template: str | None, eos: Iterable[int] = ()) -> None:
        self._core = core
        self._settings = settings  # tokenizer_config.json
        self._template = template
        named = self._token_id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*eos, *([named] if named is not None else [])]))
        self.bos_token_id = self._token_id("bos_token")

    @property
    def vocab_size(self) -> int:
        return int(self._core.get_vocab_size())

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self.chat.stop_token_ids

    @cached_property
    def chat(self) -> Chat:
        """The template's fragments; ValueError when there is no template or it cannot be compiled."""
        if self._template is None:
            raise ValueError("the tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json)")
        keys = ("bos_token", "eos_token", "unk_token", "pad_token")
        variables = {key: self._token(key) for key in keys if self._token(key) is not None}
        return Chat(self._template, variables, self._encode_template, set(self.eos_token_ids))

    def encode(self, text: str) -> list[int]:
        self._core.encode_special_tokens = True
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Iterable[int], keep_special: bool = False) -> str:
        text: str = self._core.decode(list(token_ids), skip_special_tokens=not keep_special)
        return text

    def _encode_template(self, text: str) -> list[int]:
        self._core.encode_special_tokens = False
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def _token(self, key: str) -> str | None:
        value = self._settings.get(key)
        return value["content"] if isinstance(value, dict) else value

    def _token_id(self, key: str) -> int | None:
        token = self._token(key)
        if token is None:
            return None
        found: int | None = self._core.token_to_id(token)
        if found is None:
            raise ValueError(f"{key} = {token!r} in tokenizer_config.json is not in tokenizer.json's vocabulary")
        return found

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja; all but the first may lack."""
        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = _read_json(folder / "tokenizer_config.json")
        eos = _read_json(folder / "generation_config.json").get("eos_token_id", _read_json(folder / "config.json").get("eos_token_id"))
        jinja = folder / "chat_template.jinja"
        template = jinja.read_text("utf-8") if jinja.is_file() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        return cls(core, settings, template, eos if isinstance(eos, list) else [] if eos is None else [eos])

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder."""
        folder = Path(path)
        self._core.encode_special_tokens = False
        self._core.save(str(folder / "tokenizer.json"))
        settings = {key: value for key, value in self._settings.items() if key != "chat_template"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")
        if self._template is not None:
            (folder / "chat_template.jinja").write_text(self._template, "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return found


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` ids, learned from `texts`, with a compact chat template of its own.

    Digits stand alone, so that numbers are read digit by digit. The same texts give the same tokenizer.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise ValueError(f"vocab_size = {vocab_size}: accepted is at least {256 + len(SPECIAL)} (all bytes and {len(SPECIAL)} markers)")
    core = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(core, settings, TEMPLATE)
