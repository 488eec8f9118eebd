"""Text to ids and back, and the chat template's fragments; `tokenizers` does the work, on Hugging Face's
files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from duologue.model.chat import Chat, Offsets
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
LEAST_IDS = 256 + len(SPECIAL)  # all bytes and the markers
# One token per marker, and a turn ends with the token that stops generation.
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Tokenizer:
    """`encode` treats its text as text: a special token written in it stays ordinary characters.

    eos_token_ids: what ends a text, the first is the tokenizer's own. chat: the fragments of its chat
    template.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        settings: dict[str, Any],
        template: str | None,
        eos: Iterable[int] = (),
    ) -> None:
        """`settings` is the object of tokenizer_config.json, `eos` are ids that end a text
        (generation_config.json).
        """
        self._core = core
        self._settings = settings
        self._template = template
        # As transformers does: the named tokens are special, even where tokenizer.json does not say so.
        known = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
        named = {token for token in self._named().values() if core.token_to_id(token) is not None}
        core.add_special_tokens(sorted(named - known))
        eos_token = self._token_id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*([] if eos_token is None else [eos_token]), *eos]))
        self.bos_token_id = self._token_id("bos_token")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return 1 + max(self._core.get_vocab().values())

    @property
    def eos_token_id(self) -> int | None:
        return next(iter(self.eos_token_ids), None)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The eos ids and the token that ends a turn of the chat template, if there is one."""
        return frozenset(self.eos_token_ids) if self._template is None else self.turn_chat.stop_token_ids

    @cached_property
    def chat(self) -> Chat:
        """The template's fragments, for contexts that grow; ValueError when there is no template or it cannot
        be compiled.
        """
        return self._compiled(append_only=True)

    @cached_property
    def turn_chat(self) -> Chat:
        """The same for contexts that are written anew for every turn, where a template may rewrite what went
        before.
        """
        return self._compiled(append_only=False)

    def _compiled(self, append_only: bool) -> Chat:
        if self._template is None:
            raise ValueError(
                "the tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json)"
            )
        special = [i for i, token in self._core.get_added_tokens_decoder().items() if token.special]
        return Chat(
            self._template, self._named(), self._encode_template, self.eos_token_ids, special, append_only
        )

    def encode(self, text: str) -> list[int]:
        self._core.encode_special_tokens = True
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text, without special tokens."""
        text: str = self._core.decode(list(token_ids))
        return text

    def _encode_template(self, text: str) -> tuple[list[int], Offsets]:
        self._core.encode_special_tokens = False
        encoding = self._core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _named(self) -> dict[str, str]:
        """bos_token, eos_token and the like; each is written as text or as an object."""
        tokens = {key: value for key, value in self._settings.items() if key.endswith("_token")}
        named = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
        return {key: value for key, value in named.items() if isinstance(value, str)}

    def _token_id(self, key: str) -> int | None:
        token = self._named().get(key)
        if token is None:
            return None
        token_id: int | None = self._core.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"{key} = {token!r} in tokenizer_config.json is not in tokenizer.json's vocabulary"
            )
        return token_id

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where there, tokenizer_config.json, generation_config.json,
        chat_template.jinja.
        """
        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        try:
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        settings = read_json(folder / "tokenizer_config.json")
        eos = read_json(folder / "generation_config.json").get("eos_token_id")
        if eos is None:
            eos = read_json(folder / "config.json").get("eos_token_id")
        jinja = folder / "chat_template.jinja"
        template = jinja.read_text("utf-8") if jinja.is_file() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        return cls(core, settings, template, eos if isinstance(eos, list) else [] if eos is None else [eos])

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder."""
        folder = Path(path)
        self._core.save(str(folder / "tokenizer.json"))
        settings = {key: value for key, value in self._settings.items() if key != "chat_template"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False), "utf-8"
        )
        if self._template is not None:
            (folder / "chat_template.jinja").write_text(self._template, "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty when there is no file; ValueError when it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def train_tokenizer(texts: Iterable[str], vocab_size: int, chat_template: str | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` ids, learned from `texts`.

    A word and the space before it are one unit, and a text gets no space of its own, so a word inside a
    sentence has the same ids everywhere. Digits stand alone, so that numbers are read digit by digit. The
    same texts give the same tokenizer. Without `chat_template` it has a compact one, in which each role is
    one token and `<|end|>` ends a turn.
    """
    if vocab_size < LEAST_IDS:
        raise ValueError(
            f"vocab_size = {vocab_size}: accepted is at least {LEAST_IDS} (all bytes, {len(SPECIAL)} markers)"
        )
    core = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
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
    return Tokenizer(core, settings, TEMPLATE if chat_template is None else chat_template)
