"""Text to ids and back, and the chat template's fragments; `tokenizers` does the work, on Hugging Face's
files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from duologue.model.chat import Chat, Offsets
from duologue.model.config import token_ids
from duologue.model.files import kept_files, read_json, read_text
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LEAST_IDS = 256 + len(SPECIAL)  # all bytes and the markers
# One token per marker, and a turn ends with the token that stops generation.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# What may stand before a content for it to have the ids that it has in the chat template.
ANCHORS = ("", "\n")


class Tokenizer:
    """`encode` treats its text as text: a marker of the chat template in it stays ordinary characters.

    eos_token_ids: what ends a text, the first is the tokenizer's own. chat: the fragments of its chat
    template. generation: the object of generation_config.json, which is kept for whoever saves a model.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        settings: dict[str, Any],
        template: str | None,
        eos: Iterable[int] = (),
        generation: dict[str, Any] | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        """`settings` is the object of tokenizer_config.json, `eos` are ids that end a text
        (generation_config.json), `files` go unchanged into every folder that this is saved in.
        """
        core.no_truncation()  # settings of batches, which these texts are not
        core.no_padding()
        self._core = core
        self.generation = generation or {}
        self._files = files or {}
        self._settings = settings
        self._template = template
        self._add_listed()
        # As transformers does: the named tokens are special, even where tokenizer.json does not say so.
        known = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
        named = [*self._named().values(), *self._listed()]
        present = {token for token in named if core.token_to_id(token) is not None}
        core.add_special_tokens(sorted(present - known))
        eos_token = self._token_id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*([] if eos_token is None else [eos_token]), *eos]))
        self.bos_token_id = self._token_id("bos_token")

    def equals(self, other: Tokenizer) -> bool:
        """Whether both give every conversation the same ids."""
        mine, theirs = ((t._core.to_str(), t._template, t._named(), t.eos_token_ids) for t in (self, other))
        return mine == theirs

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return 1 + max(self._core.get_vocab().values())

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """What `decode` leaves out of every text."""
        added = self._core.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def digest(self) -> str:
        """A name for what this makes of texts and turns."""
        made = [self._core.to_str(), self._template, self._named(), self.eos_token_ids]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

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
        chat = Chat(
            self._template, self._named(), self._encode_template, self.eos_token_ids, special, append_only
        )
        self._find_anchor(chat)
        return chat

    def _find_anchor(self, chat: Chat) -> str:
        """What to encode a content behind; ValueError when nothing gives it the ids that it has in place."""
        for anchor in ANCHORS:
            if all(self._behind(self._core, anchor, text)[0] == ids for text, ids in chat.contents):
                return anchor
        text, ids = chat.contents[0]
        raise ValueError(
            f"tokenizer.json gives {text!r} the ids {ids} inside the chat template, and "
            f"{self._behind(self._core, '', text)[0]} alone: it adds a space of its own to a text. "
            "accepted is a tokenizer, or a template, in which a content has the same ids in every turn"
        )

    @cached_property
    def _markers(self) -> frozenset[int]:
        """Added tokens that the chat template writes, and what ends a text: no content may yield one."""
        try:
            written = {*self.turn_chat.written_ids, *self.turn_chat.stop_token_ids}
        except ValueError:  # no content is put anywhere
            written = set(self.eos_token_ids)
        unknown = getattr(self._core.model, "unk_token", None)
        return frozenset(
            i
            for i, token in self._core.get_added_tokens_decoder().items()
            if i in written and token.content != unknown
        )

    @cached_property
    def _contents(self) -> tuple[tokenizers.Tokenizer, str]:
        """(tokenizer, anchor) for contents. Here all markers are special: `encode_special_tokens` leaves
        those in their characters.
        """
        added = self._core.get_added_tokens_decoder()
        plain = [added[i].content for i in self._markers if not added[i].special]
        core = self._core
        if plain:
            core = tokenizers.Tokenizer.from_str(core.to_str())
            core.add_special_tokens(plain)
        try:
            return core, self._find_anchor(self.turn_chat)
        except ValueError:
            return core, ""

    def encode(self, text: str) -> list[int]:
        """The ids of a content, as they stand inside the chat template; no marker of it is among them."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The same, and where the characters of each id begin and end in `text`."""
        core, anchor = self._contents
        ids, offsets = self._behind(core, anchor, text)
        marked = next((at for i, at in zip(ids, offsets, strict=True) if i in self._markers), None)
        if marked is None:
            return ids, offsets
        start, end = marked  # the model of this tokenizer makes it of plain characters
        if end - start < 2:
            return self.encode_with_offsets(text[:start] + "\ufffd" + text[end:])
        cut = start + 1
        ids, offsets = self.encode_with_offsets(text[:cut])
        more, behind = self.encode_with_offsets(text[cut:])
        return ids + more, offsets + [(cut + start, cut + end) for start, end in behind]

    def _behind(self, core: tokenizers.Tokenizer, anchor: str, text: str) -> tuple[list[int], Offsets]:
        """Ids and offsets of `text` behind `anchor`, without the anchor's; alone where both join."""
        core.encode_special_tokens = True
        try:
            encoding = core.encode(anchor + text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # half of a surrogate pair
            return self._behind(
                core, anchor, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            )
        at = len(anchor)
        n = sum(start < at for start, _ in encoding.offsets)
        if n and encoding.offsets[n - 1][1] > at:
            return self._behind(core, ":" if anchor == "\n" else "", text)
        return encoding.ids[n:], [(start - at, end - at) for start, end in encoding.offsets[n:]]

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
        named = {key: _content(key, value) for key, value in tokens.items() if type(value) is not bool}
        return {key: value for key, value in named.items() if value is not None}

    def _listed(self) -> list[str]:
        """Further special tokens of tokenizer_config.json."""
        tokens = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = self._settings.get(key) or []
            if isinstance(listed, dict):
                listed = list(listed.values())
            if not isinstance(listed, list):
                raise ValueError(f"{key} = {listed!r} in tokenizer_config.json: accepted is a list of tokens")
            tokens += [_content(key, token) for token in listed]
        return [token for token in tokens if token]

    def _add_listed(self) -> None:
        """Tokens that only tokenizer_config.json has get the ids that it says, or ValueError."""
        key = "added_tokens_decoder"
        listed = self._settings.get(key) or {}
        if (
            not isinstance(listed, dict)
            or not all(i.isdecimal() for i in listed)
            or not all(isinstance(token, dict) for token in listed.values())
        ):
            raise ValueError(
                f"{key} = {str(listed)[:80]} in tokenizer_config.json: accepted are objects by id"
            )
        for i, value in sorted(listed.items(), key=lambda item: int(item[0])):
            token = _content(key, value)
            if token is None or self._core.token_to_id(token) == int(i):
                continue
            names = ("special", "single_word", "lstrip", "rstrip", "normalized")
            if self._core.token_to_id(token) is None:
                flags = {name: value.get(name) is True for name in names}
                self._core.add_tokens([tokenizers.AddedToken(token, **flags)])
            known = self._core.token_to_id(token)
            if known != int(i):
                raise ValueError(
                    f"{key} in tokenizer_config.json has {token!r} as {i}: accepted is its id here, {known}"
                )

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
    def from_dir(cls, path: str | Path, base: Tokenizer | None = None) -> Tokenizer:
        """Read tokenizer.json and, where there, tokenizer_config.json, generation_config.json,
        chat_template.jinja, and special_tokens_map.json of folders that older versions of transformers wrote.
        `base` is the tokenizer below an adapter: it says what ends a text where the folder does not.
        """
        folder = Path(path)
        core = _read_core(folder)
        settings = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            settings = {**settings, **read_json(folder / "special_tokens_map.json")}
        generation = read_json(folder / "generation_config.json")
        eos = token_ids(generation, "eos_token_id", str(folder / "generation_config.json"))
        if generation.get("eos_token_id") is None:
            eos = token_ids(read_json(folder / "config.json"), "eos_token_id", str(folder / "config.json"))
        if base is not None and not eos:
            eos, generation = base.eos_token_ids, base.generation
        template = _read_template(folder, settings)
        try:
            return cls(core, settings, template, eos, generation, kept_files(folder))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder, and
        what lay beside them where they were read.
        """
        folder = Path(path)
        self._core.save(str(folder / "tokenizer.json"))
        for name, data in self._files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        own = self._settings.get("chat_template")
        settings = {
            key: value
            for key, value in self._settings.items()
            if key != "chat_template" or value != self._template
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False), "utf-8"
        )
        if self._template is not None and self._template not in _templates(own).values():
            (folder / "chat_template.jinja").write_text(self._template, "utf-8")


def _content(key: str, token: Any) -> str | None:
    """A token is written as text, as an object with its text, or as null."""
    text = token.get("content") if isinstance(token, dict) else token
    if (text is None and token is not None) or not isinstance(text, str | None):
        raise ValueError(
            f"{key} = {token!r} in tokenizer_config.json: accepted is a string, or an object with content"
        )
    return text


def _read_core(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, its panics are no Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read: {reason}") from error
    if not core.get_vocab():
        raise ValueError(f"{file} has an empty vocabulary: accepted is one of at least one token")
    return core


def _templates(value: Any) -> dict[str, str]:
    """Several named templates, as a list of objects or as one object; none of anything else."""
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
    named = value.items() if isinstance(value, dict) else ()
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja)
    template = settings.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if not _templates(template):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template = {str(template)[:80]}: accepted is a "
            "string, or templates by name"
        )
    return _templates(template).get("default")


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
