"""Two-persona dialogues on the engine beside transformers' `generate`, and what turns, groups and context
cost.

    python bench/dialogues.py [--only ours] [--json] [--save] [--turns 6] [--tokens 48] [--groups 1]
    python bench/dialogues.py --device cuda --model 0.6B --only ours --groups 16

A dialogue: a shared scenario of 256 tokens, 16 private ones per side, then six turns of 48 tokens in which
the sides alternate; G = 8 dialogues per scenario. Both play the product's negotiation in its arena; only
who speaks differs. Ours keeps both sides' KV between turns and computes the scenario once for all; the
other feeds each turn's whole context to `generate`, batched over all dialogues. Both sample; tokens per
second count sampled tokens only. Random Qwen3 weights, 4.2M.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.kernels import backend
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.games.selection import SelectionGame
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import EngineSpeaker, Speak, Speaker

from bench.common import append_rows, tokens_per_second
from bench.models import QWEN3, SAMPLED, chosen

PRIVATE = 16
Opening = tuple[list[int], list[int]]


class Plain:
    """Ids written as text, in place of a tokenizer and its chat: contexts hold what is said and nothing
    around it.
    """

    stop_token_ids: frozenset[int] = frozenset()

    @property
    def chat(self) -> Plain:
        return self

    def said(self, ids: list[int]) -> list[int]:
        return ids

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def open(self, ids: list[int]) -> list[int]:
        return ids

    def heard(self, ids: list[int]) -> list[int]:
        return ids

    def reply(self) -> list[int]:
        return []

    def close_reply(self, stopped: bool) -> list[int]:
        return []


class TalkOnly(SelectionGame):
    """A negotiation that nobody closes, so that it is talk alone."""

    name = "talk"
    final_prompt = ""
    splits: dict[str, list[Opening]] = {}  # noqa: RUF012

    def scenario(self, opening: Opening, split: str) -> Scenario:
        first, second = (" ".join(map(str, ids)) for ids in opening)
        return Scenario(game=self.name, id="", split=split, private_text=(first, second), data=None)

    def closes(self, text: str) -> bool:
        return False

    def judge(self, scenario: Scenario, finals: tuple[str, str] | None) -> Outcome:
        return Outcome(agreed=False, scores=(0.0, 0.0))

    def rewards(self, scenario: Scenario, outcome: Outcome) -> tuple[float, float]:
        return outcome.scores

    def summarise(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        return {}


class Clocked(EngineSpeaker):
    """`began`: when the first dialogue was asked for its n-th turn."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.began: dict[int, float] = {}

    def ask(self, turn: Speak) -> None:
        self.began.setdefault(len(turn.heard), time.perf_counter())
        super().ask(turn)


class Generate:
    """transformers' `generate` as a speaker: each turn's whole context, batched over all dialogues."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.turns: list[Speak] = []

    @property
    def busy(self) -> bool:
        return bool(self.turns)

    def open(self, token_ids: Sequence[int], adapter: int = 0) -> None:
        return None

    def ask(self, turn: Speak) -> None:
        self.turns.append(turn)

    def answered(self, wait: bool) -> list[tuple[Speak, Completion | None]]:
        turns, self.turns = self.turns, []
        ids = torch.tensor([turn.view.token_ids for turn in turns]).to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=turns[0].params.max_new_tokens,
                **SAMPLED,
            )
        said = out[:, ids.shape[1] :].tolist()
        return [(turn, Completion(token_ids=words)) for turn, words in zip(turns, said, strict=True)]

    def close(self) -> None:
        return


def openings(vocab: int, scenario: int, groups: int) -> list[Opening]:
    """The opening ids of both sides, per group: the shared scenario first."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(groups):
        shared = torch.randint(0, vocab, (scenario,), generator=g).tolist()
        first, second = (torch.randint(0, vocab, (PRIVATE,), generator=g).tolist() for _ in range(2))
        made.append((shared + first, shared + second))
    return made


def play(policy: Speaker, opening: list[Opening], G: int, turns: int, tokens: int) -> int:
    """Hold the dialogues, `turns` turns each, of an even number; how many tokens were sampled."""
    game, rules = TalkOnly(), Rules(max_rounds=turns // 2, max_tokens_per_turn=tokens, first_speaker="first")
    arena = Arena(policy, Plain(), game, rules)
    groups = arena.play([game.scenario(pair, "train") for pair in opening], group_size=G, seed=0)
    return sum(len(turn.token_ids) for group in groups for d in group.dialogues for turn in d.turns)


def engine_for(model: Decoder, dialogues: int, length: int) -> Engine:
    return Engine(model, cache_tokens=(2 * dialogues + 4) * (length + 32), max_batch=max(dialogues, 8))


def compare(model: Decoder, theirs: Any, args: argparse.Namespace) -> dict[str, Any]:
    opening = openings(model.config.vocab_size, 256, args.groups)
    engine = engine_for(model, args.groups * 8, 256 + PRIVATE + args.turns * args.tokens)
    speakers: dict[str, Speaker] = {"ours": EngineSpeaker(engine)}
    if args.only is None:
        speakers["transformers"] = Generate(theirs)
    runs = {
        name: partial(play, speaker, opening, 8, args.turns, args.tokens)
        for name, speaker in speakers.items()
    }
    rates = tokens_per_second(runs, args.repeats)
    row: dict[str, Any] = {
        "case": "dialogues",
        "model": args.model,
        "groups": args.groups,
        "G": 8,
        "turns": args.turns,
    }
    row["tokens"] = args.tokens
    row |= {f"{side}_tokens_per_s": round(speed, 1) for side, speed in rates.items()}
    if "transformers" in rates:
        row["ratio"] = round(row["ours_tokens_per_s"] / row["transformers_tokens_per_s"], 2)
    return row | {
        "shared_tokens": engine.stats.shared_tokens,
        "idle_slot_share": round(engine.stats.idle_slot_steps / max(engine.stats.slot_steps, 1), 3),
    }


def costs(model: Decoder, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds per turn as turns, the group and the scenario grow; and the tokens computed that were
    not sampled.
    """
    rows = []
    vocab = model.config.vocab_size
    cases = [("turns", 8, 256, n) for n in (2, 4, 8, 12)]
    cases += [("group", n, 256, 4) for n in (1, 2, 4, 16)] + [("scenario", 8, n, 4) for n in (64, 1024)]
    for what, G, scenario, turns in cases:
        opening = openings(vocab, scenario, 1)
        engine = engine_for(model, G, scenario + PRIVATE + turns * args.tokens)
        play(EngineSpeaker(engine), opening, G, turns, args.tokens)
        before, speaker = engine.stats.prefill_tokens, Clocked(engine)
        play(speaker, opening, G, turns, args.tokens)
        times = [*speaker.began.values(), time.perf_counter()]
        seconds = [after - began for began, after in pairwise(times)]
        rows.append(
            {
                "case": f"cost of {what}",
                "G": G,
                "turns": turns,
                "tokens": args.tokens,
                "scenario": scenario,
                "first_turn_ms": round(seconds[0] * 1e3, 1),
                "last_turn_ms": round(seconds[-1] * 1e3, 1),
                "ms_per_turn_and_dialogue": round(sum(seconds) / turns / G * 1e3, 2),
                "prefill_tokens_per_dialogue": round((engine.stats.prefill_tokens - before) / G, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["ours"], help="leave transformers out")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/dialogues*.csv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--model", choices=["4.2M", *QWEN3], default="4.2M", help="Qwen3's shapes with --only ours"
    )
    args = parser.parse_args()
    if args.turns % 2:
        parser.error(f"--turns {args.turns}: accepted is an even number, the sides alternate")
    theirs, model = chosen(parser, args, max_positions=4096)
    compared, grown = compare(model, theirs, args), costs(model, args)
    if not args.json:
        for row in (compared, *grown):
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.save:
        append_rows("dialogues", [compared])
        append_rows("dialogue_costs", grown)
    print(json.dumps({"bench": "dialogues", "backend": backend.describe(), "rows": [compared, *grown]}))


if __name__ == "__main__":
    main()
