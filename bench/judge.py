"""The judge in this process on a real checkpoint: whether every question is answered, how many groups of
dialogues have rewards that differ, and what a question costs.

    python bench/judge.py MODEL_DIR [--groups 32] [--readings 4] [--dtype bfloat16] [--save]

The checkpoint talks with itself about the shipped dilemmas, in groups of eight short dialogues, and judges
them. Every score is made of the same probabilities: their expected value, and the likeliest digit, of the
first reading and of all. A group whose rewards are all equal teaches GRPO nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.model.checkpoint import load_model
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games.dilemma import DilemmaGame
from duologue.rollout.games.game import UNSCORED
from duologue.rollout.judge.form import averaged
from duologue.rollout.judge.judge import Answer, FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.model import ModelJudge
from duologue.rollout.judge.questions import AGREEMENT, REQUIRED, SCORE, load_prompt
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import Dialogue, Group
from duologue.rollout.selfplay.rules import Rules

from bench.common import append_rows

ASPECTS = ("knowledge", "benevolence", "power", "vitality")


class Recorder(FeedbackJudge):
    """Keeps what was asked with its answer."""

    def answered(self, wait: bool) -> list[tuple[Any, Answer]]:
        answers = super().answered(wait)
        self.record: list[tuple[Any, Answer]] = [*getattr(self, "record", []), *answers]
        return answers


def play(options: argparse.Namespace) -> tuple[list[Group], Recorder, dict[str, float], float]:
    """The groups, who judged them, what a question cost, and seconds."""
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_model(options.model, "cpu", dtype)
    backend = ModelJudge(
        lambda: (Engine(model, cache_tokens=65536), tokenizer),
        threshold=options.threshold,
        readings=options.readings,
    )
    prompts = {kind: load_prompt(kind, held=True) for kind in REQUIRED}
    judge = Recorder(backend, Ledger(Path(":memory:")), prompts, max_unscored_share=1.0, held=True)
    game = DilemmaGame()
    rules = Rules(
        max_rounds=1,
        max_tokens_per_turn=options.tokens,
        max_tokens_final=options.tokens,
        context="last_2",
        temperature=0.8,
    )
    arena = Arena(Engine(model, cache_tokens=65536), tokenizer, game, rules, judge)
    rng = random.Random(options.seed)
    groups: list[Group] = []
    totals: dict[str, float] = {}
    began = time.monotonic()
    for at in range(0, options.groups, options.at_once):
        scenarios = [game.sample(rng, "train") for _ in range(min(options.at_once, options.groups - at))]
        groups += arena.play(scenarios, group_size=8, seed=options.seed, first_group=at)
        costs = judge.costs()
        asked = costs.pop("judge_asked")
        for name in ("prefill_tokens", "shared_tokens", "decode_tokens", "work_seconds"):
            totals[name] = totals.get(name, 0.0) + asked * costs[f"judge_{name}"]
        totals["asked"] = totals.get("asked", 0.0) + asked
        print(f"{len(groups)} groups, {totals['asked']:.0f} questions", file=sys.stderr, flush=True)
    cost = {name: total / totals["asked"] for name, total in totals.items() if name != "asked"}
    return groups, judge, {"asked": totals["asked"], **cost}, time.monotonic() - began


def reward(dialogue: Dialogue, readings: dict[str, Any], score: str, n: int) -> float | None:
    """What the dialogue would have by this kind of score over its first `n` readings; None is unscored."""
    outcome = dialogue.outcome
    assert outcome is not None
    if outcome.failure == UNSCORED:
        return None
    if not outcome.agreed:
        return 0.0
    final = "".join(turn.text for turn in dialogue.turns if turn.kind == "final")
    found = readings[dialogue.scenario.shared_text + "\0" + final]
    of_reading = [{aspect: found[aspect][i] for aspect in ASPECTS} for i in range(n)]
    scores = averaged(of_reading, score == "expected")
    return statistics.fmean(scores[aspect] for aspect in ASPECTS)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    groups, judge, cost, seconds = play(options)
    asked = [(question.kind, question.case, answer) for question, answer in judge.record]
    readings = {
        case.dilemma + "\0" + case.completion: answer["probabilities"]
        for kind, case, answer in asked
        if kind == SCORE and answer is not None
    }
    yes = [a["probabilities"]["true"] for kind, _, a in asked if kind == AGREEMENT and a is not None]
    of_all = {
        "model": Path(options.model).name if not options.name else options.name,
        "dtype": options.dtype,
        "groups": len(groups),
        "questions": len(asked),
        "unscored": sum(answer is None for _, _, answer in asked),
        "agreed": round(statistics.fmean(d.outcome.agreed for g in groups for d in g.dialogues), 4),
        "mean_true": round(statistics.fmean(yes), 4),
        **{name: round(value, 3) for name, value in cost.items()},
        "seconds": round(seconds, 1),
    }
    found = []
    for n in sorted({1, options.readings}):
        for score in ("likeliest", "expected"):
            rewards = [[reward(d, readings, score, n) for d in group.dialogues] for group in groups]
            scored = [[r for r in group if r is not None] for group in rewards]
            flat = statistics.fmean(len(set(group)) <= 1 for group in scored)
            spread = statistics.fmean(statistics.pstdev(group) for group in scored if group)
            row = {"score": score, "readings": n, "flat_groups": round(flat, 4), "mean_std": round(spread, 4)}
            found.append({**of_all, **row})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--name", default="", help="of the checkpoint, in the rows")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--groups", type=int, default=32, help="of eight dialogues")
    parser.add_argument("--at-once", type=int, default=4, help="groups that are played together")
    parser.add_argument("--tokens", type=int, default=24, help="of a turn and of a final")
    parser.add_argument("--readings", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append the rows to results/judge.csv")
    options = parser.parse_args(arguments)
    found = rows(options)
    for row in found:
        print(json.dumps(row))
    if options.save:
        append_rows("judge", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
