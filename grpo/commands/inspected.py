"""The dialogues of a run as an indexed page holds them: an index of all, and parts that are read on demand.

A part has the words of some dialogues as JSON, and the numbers of their tokens as columns one after the
other, both gzipped and in base64. Numbers stay as they were recorded, bit for bit: a column takes 4 bytes a
token where all of it is fp32, else 8.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from duologue.grpo.commands.charts import is_number
from duologue.grpo.commands.records import Record, with_numbers
from duologue.grpo.run_dir import compact
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.game import Game, Persona
from duologue.rollout.judge.questions import AGREEMENT, SCORE, Prompt
from duologue.rollout.selfplay.dialogue import POLICY, RECORDED, Turn
from duologue.rollout.selfplay.question import case_of

PART = 128  # dialogues of a part
SHORT = ("entropy",)
HEAD = 90  # characters of a dialogue's first words in the list
COLUMNS = ("logprob", "entropy", "support", "other", "piece")  # of a token; `other`: by another checkpoint


def packed(data: bytes) -> str:
    """Gzipped, in base64: characters that no HTML reads as anything."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def packed_json(value: Any) -> str:
    return packed(compact(value).encode("utf-8", "replace"))


@dataclass(eq=False)
class Pieces:
    """The texts that tokens stand for: `of` gives places in `table`, whose rows are (id, text)."""

    tokenizer: Tokenizer | None
    table: list[tuple[int, str]] = field(default_factory=list)
    _places: dict[tuple[int, str], int] = field(default_factory=dict)
    _alone: dict[int, str] = field(default_factory=dict)

    def of(self, ids: Sequence[int]) -> list[int]:
        return [self._place((i, text)) for i, text in zip(ids, self._texts(ids), strict=True)]

    def _place(self, piece: tuple[int, str]) -> int:
        if piece not in self._places:
            self._places[piece] = len(self.table)
            self.table.append(piece)
        return self._places[piece]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """Of each token alone where these make the whole; else what each adds to those before it, "" in the
        midst of a character.
        """
        if self.tokenizer is None:
            return [""] * len(ids)
        for i in ids:
            if i not in self._alone:
                self._alone[i] = self.tokenizer.decode([i])
        alone = [self._alone[i] for i in ids]
        if "".join(alone) == self.tokenizer.decode(ids):
            return alone
        texts, before = [], ""
        for n in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:n])
            split = text.endswith("\ufffd") and n < len(ids)
            texts.append("" if split else text[len(before) :])
            before = before if split else text
        return texts


def turn_advantages(record: Record) -> list[float | None]:
    """Of each turn its own, with credit by turn, or that of its side."""
    own, of_sides = iter(record.get("turn_advantages", ())), record.get("advantage")
    found = []
    for turn in record["turns"]:
        by_turn = next(own, None) if turn["kind"] != "prompt" else None
        of_side = of_sides[turn["role"]] if of_sides else None
        found.append(of_side if by_turn is None else by_turn)
    return found


def why_untrained(record: Record, turn: Record, grpo: Mapping[str, Any]) -> str:
    """Why no update has a turn's tokens, "" where one has: the rule by which rows are masked."""
    player = record.get("players", (POLICY, POLICY))[turn["role"]]
    kind = turn["kind"]
    reasons = (
        (kind == "prompt", "the game's words, which nobody sampled"),
        (player != POLICY, f"said by {player}, not by the policy"),
        (turn["logprobs"] is None, "not sampled"),
        (record["stage"] != "selfplay", "not of training: nothing is learned from it"),
        (record["reward"] is None, "the dialogue is unscored"),
        (record.get("dropped", False), "dropped: its group teaches nothing, another was played in its place"),
        (kind not in grpo["train_kinds"], f"of kind {kind}, which grpo.train_kinds leaves out"),
        (turn["role"] == 1 and grpo["train_roles"] == "first", "side 2, which grpo.train_roles leaves out"),
    )
    return next((why for holds, why in reasons if holds), "")


@dataclass(eq=False)
class Part:
    """Dialogues that are read together."""

    words: list[Record] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def add(self, words: Record, tokens: Mapping[str, Sequence[float]]) -> None:
        self.words.append({**words, "start": len(self.columns["piece"])})
        for name in COLUMNS:
            self.columns[name] += tokens[name]

    def packed(self) -> tuple[str, str]:
        """(words, numbers). Before the words stands where each column begins and its bytes a number; of a
        column without any number there is none.
        """
        arrays = {name: _column(values, name in SHORT) for name, values in self.columns.items()}
        kept = [(name, array) for name, array in arrays.items() if not np.isnan(array).all()]
        kept.sort(key=lambda pair: -pair[1].itemsize)  # each begins at a multiple of its own size
        places, at = {}, 0
        for name, array in kept:
            places[name] = (at, array.itemsize)
            at += array.nbytes
        numbers = b"".join(array.tobytes() for _, array in kept)
        return packed_json([places, self.words]), packed(numbers)


def _column(values: Sequence[float], short: bool) -> np.ndarray:
    """Little-endian fp32 where that holds every value, else fp64; NaN stands for nothing. `short` values are
    fp32 numbers that were written with as many digits as tell them apart.
    """
    exact = np.array(values, dtype="<f8")
    with np.errstate(over="ignore"):
        rounded = exact.astype("<f4")
    if short or np.array_equal(rounded.astype("<f8"), exact, equal_nan=True):
        return rounded
    return exact


class Dialogues:
    """Takes records of dialogues.jsonl one by one; then `index` and `parts` are what a page holds."""

    def __init__(
        self,
        game: type[Game],
        config: Record,
        tokenizer: Tokenizer | None,
        prompts: Mapping[str, Prompt] | None = None,
    ) -> None:
        """`config` is the run's; `prompts` are its judge's, by the kind of question."""
        self.game, self.grpo, self.prompts = game, config["grpo"], prompts or {}
        self._show_dialogue = bool(config.get("judge", {}).get("show_dialogue"))
        self.pieces = Pieces(tokenizer)
        self.parts: list[tuple[str, str]] = []
        self.recorded = dict.fromkeys(("entropy", "asked", "other"), 0)  # dialogues that have it
        self._part = Part()
        self._list: dict[str, list[Any]] = {}
        self._groups: dict[tuple[Any, ...], int] = {}
        self._last: tuple[Any, ...] = ()  # of the last record: what the dialogues of one group share
        self._number = self._size = 0  # of its group: its number in the step, its dialogues so far

    def __len__(self) -> int:
        return sum(len(values) for values in [*self._list.values()][:1])

    def add(self, record: Record, other: list[float] | None = None) -> None:
        """`other` are the log-probs of its tokens by another checkpoint."""
        record = with_numbers(record)
        shown = self.game.shown(record)
        tokens = self._tokens(record["turns"])
        if other is not None:
            tokens["other"] = other
            self.recorded["other"] += 1
        words = self._words(record, shown)
        self._enter(record, words, tokens["logprob"])
        self._part.add(words, tokens)
        if len(self._part.words) == PART:
            self._close_part()

    def index(self) -> str:
        """What the list shows of every dialogue, and all pieces of text; closes the last part."""
        if self._part.words:
            self._close_part()
        return packed_json({"list": self._list, "part": PART, "pieces": self.pieces.table})

    def _close_part(self) -> None:
        self.parts.append(self._part.packed())
        self._part = Part()

    def _tokens(self, turns: Iterable[Record]) -> dict[str, list[float]]:
        nothing = float("nan")
        columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for turn in turns:
            n = len(turn["token_ids"])
            if "entropies" in turn and "support_sizes" not in turn:
                turn = {**turn, "support_sizes": [0] * n}  # all tokens, each time
            for name, key in (
                ("logprob", "logprobs"),
                ("entropy", "entropies"),
                ("support", "support_sizes"),
            ):
                values = turn.get(key) or [nothing] * n
                columns[name] += [value if is_number(value) else nothing for value in values]
            columns["other"] += [nothing] * n
            columns["piece"] += self.pieces.of(turn["token_ids"])
        return columns

    def _words(self, record: Record, shown: Record) -> Record:
        personas = record["personas"]
        told, scenario = shown["told"], record["scenario"]
        turns = [
            {
                "side": turn["role"],
                "kind": turn["kind"],
                "text": turn["text"],
                "n": len(turn["token_ids"]),
                "why": why_untrained(record, turn, self.grpo),
                "advantage": advantage,
            }
            for turn, advantage in zip(record["turns"], turn_advantages(record), strict=True)
        ]
        words = {
            "id": scenario["id"],
            "split": scenario["split"],
            "shared": scenario.get("shared", ""),
            "told": told if len(told) == 2 or personas else scenario["private"],
            "sides": shown["sides"],
            "players": record.get("players", (POLICY, POLICY)),
            "turns": turns,
            "verdict": shown["verdict"],
            "measures": shown["measures"],
            "reason": shown["reason"],
            "reward": record["reward"],
            "version": record.get("weights_version"),
        }
        if "asked" in record:
            words["asked"] = [self._asked(record, asked) for asked in record["asked"]]
        return words

    def _asked(self, record: Record, asked: Record) -> Record:
        """A question with what stood in the places of its prompt, where that is known."""
        kind = asked["kind"]
        if kind not in self.prompts:
            return asked
        said = [Turn(**{name: turn[name] for name in RECORDED}) for turn in record["turns"][: asked["turns"]]]
        unfinished = kind == SCORE and all(turn.kind != "final" for turn in said)
        personas = tuple(Persona(**persona) for persona in record["personas"])
        case = case_of(record["scenario"].get("shared", ""), personas, said, unfinished)
        places = self.prompts[kind].places(case, self._show_dialogue or kind == AGREEMENT)
        return {**asked, "places": places}

    def _enter(self, record: Record, words: Record, logprobs: Sequence[float]) -> None:
        """A row of the list."""
        turns, reward = record["turns"], record["reward"] or (None, None)
        said = next((turn["text"] for turn in turns if turn["kind"] != "prompt"), "")
        known = [value for value in logprobs if is_number(value)]
        group, number = self._group(record)
        row = {
            "step": record["step"],
            "stage": record["stage"],
            "policy": record.get("policy", ""),
            "group": group,
            "number": number,
            "verdict": words["verdict"],
            "dropped": bool(record.get("dropped")),
            "agreed": bool((record["outcome"] or {}).get("agreed")),
            "reward0": reward[0],
            "reward1": reward[1],
            "tokens": len(logprobs),
            "logprob": float(f"{sum(known) / len(known):.4g}") if known else None,
            "players": " and ".join(words["players"]),
            "head": said[:HEAD],
        }
        for key, value in row.items():
            self._list.setdefault(key, []).append(value)
        sampled = [turn for turn in turns if turn["logprobs"] is not None]
        self.recorded["entropy"] += any("entropies" in turn for turn in sampled)
        self.recorded["asked"] += "asked" in record

    def _group(self, record: Record) -> tuple[int, int]:
        """(the group among all, its number in the step). A group's dialogues follow each other; those of an
        evaluation have the same place in the evaluations of other policies.
        """
        scenario, is_training = record["scenario"]["id"], record["stage"] == "selfplay"
        at = (record["step"], record["stage"], record.get("policy"), record.get("dropped"))
        follows = is_training and self._last == (at, scenario) and self._size < int(self.grpo["group_size"])
        if self._last[:1] != (at,):
            self._number = 0
        elif not follows:
            self._number += 1
        self._size = self._size + 1 if follows else 1
        self._last = (at, scenario)
        key = (at if is_training else (record["stage"], scenario), self._number)
        return self._groups.setdefault(key, len(self._groups)), self._number
