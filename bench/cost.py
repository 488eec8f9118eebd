"""What a dialogue of `collective-agency` costs: requests, tokens and seconds, by a model of the machine that
is checked here.

    python -m bench.cost [--dialogues 16] [--rounds 3] [--json] [--save]

Plays the recipe's protocol on the shipped dilemmas with a random 4.2M model and a judge in this process that
agrees after --rounds rounds, and makes the update. What was counted (steps, tokens, contexts) goes into the
cost model with the rates of a copy and of a matrix product measured here; the table shows predicted beside
measured seconds. The same counts, in Qwen3-14B's shape and with the recipe's lengths, give the seconds on one
H200 (4.3 TB/s, 790 TFLOP/s measured elsewhere). The paper reports 13 s per dialogue.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import GrpoSection
from duologue.grpo.loss import LossConfig
from duologue.grpo.rows import grpo_rows
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.runner import token_bytes
from duologue.rollout.games.dilemma import DilemmaGame
from duologue.rollout.judge.asking import Ask
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.questions import AGREEMENT, REQUIRED, load_prompt
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import assign_rewards
from duologue.rollout.selfplay.rules import Rules

from bench.common import append_rows, ceilings

ANSWER_TOKENS = 60  # of a judge
LENGTHS = {"max_tokens_per_turn": 256, "max_tokens_final": 512}  # the recipe's
H200 = (4.3e12, 790e12)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    name: str
    weights: float  # that are multiplied per token
    bytes_: float  # of them
    kv_bytes: float  # of a token


QWEN3_14B = Shape(name="Qwen3-14B bf16", weights=14.0e9, bytes_=28.0e9, kv_bytes=40 * 2 * 8 * 128 * 2)


@dataclass(kw_only=True, slots=True)
class Counts:
    """Of all dialogues together."""

    dialogues: int
    steps: float  # of the engine
    prefill: float  # tokens
    decode: float
    context: float  # tokens of KV that a decoded token reads, on average
    update: float  # tokens that go forward and backward
    judge_requests: float
    judge_prompt: float  # tokens
    judge_rounds: float  # questions one after the other

    def longer(self, factor: float) -> Counts:
        """The same talks with turns `factor` times as long; openings keep their length, so this is an upper
        bound."""
        return Counts(
            dialogues=self.dialogues,
            steps=self.steps * factor,
            prefill=self.prefill * factor,
            decode=self.decode * factor,
            context=self.context * factor,
            update=self.update * factor,
            judge_requests=self.judge_requests,
            judge_prompt=self.judge_prompt * factor,
            judge_rounds=self.judge_rounds,
        )


def predict(counts: Counts, shape: Shape, bandwidth: float, rate: float) -> dict[str, float]:
    """Seconds of each part. A decode step reads all weights once and each row's KV, or multiplies, whichever
    takes longer."""
    read = (
        counts.steps * shape.bytes_ / bandwidth + counts.decode * counts.context * shape.kv_bytes / bandwidth
    )
    rows = counts.judge_requests / max(counts.judge_rounds, 1)
    return {
        "prefill": 2 * shape.weights * counts.prefill / rate,
        "decode": max(read, 2 * shape.weights * counts.decode / rate),
        "update": 6 * shape.weights * counts.update / rate,
        "judge (same shape)": 2 * shape.weights * counts.judge_prompt / rate
        + counts.judge_rounds
        * ANSWER_TOKENS
        * max(shape.bytes_ / bandwidth, 2 * shape.weights * rows / rate),
    }


class Instant:
    """Agrees from a round on and gives random scores; counts what it is asked."""

    name = "instant"

    def __init__(self, rounds: int) -> None:
        self.settings: dict[str, object] = {}
        self.rounds = rounds
        self.texts: list[str] = []
        self.rng = random.Random(0)

    def ask(self, question: Ask) -> None:
        self.texts.append(question.text)
        turns = question.text.count("<turn ") - question.text.count("`<turn ")
        if question.kind == AGREEMENT:
            spoken = [t.split("</turn>")[0] for t in question.text.split("<turn speaker=")[1:]]
            quote = {
                i: next((t[4:].split()[0] for t in spoken if t[1] == i and t[4:].split()), "") for i in "12"
            }
            yes = turns >= 2 * self.rounds and all(quote.values())
            answer: dict[str, Any] = {"agreed": yes, "assent": quote if yes else {"1": "", "2": ""}}
        else:
            answer = {
                aspect: self.rng.randint(0, 5) for aspect in ("knowledge", "benevolence", "power", "vitality")
            } | {"reason": "r"}
        question.check(json.dumps(answer))
        question.done(json.dumps(answer), "")

    def work(self) -> bool:
        return False

    def close(self) -> None:
        return


@contextmanager
def clocked(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    into[name] = time.perf_counter() - began


def play(dialogues: int, rounds: int, lengths: dict[str, int]) -> tuple[Counts, dict[str, float], Shape]:
    game = DilemmaGame()
    texts = [text for _, text, _ in game.items["train"]]
    tokenizer = train_tokenizer([*texts, *(p.instructions for _, pair in game.pairs for p in pair)], 4096)
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = Decoder(config)
    model.init_weights(0)
    backend = Instant(rounds)
    judge = FeedbackJudge(
        backend,
        Ledger(Path(":memory:")),
        {kind: load_prompt(kind) for kind in REQUIRED},
        max_unscored_share=0.99,
    )
    rules = Rules(max_rounds=rounds + 1, temperature=0.7, context="last_2", **lengths)
    engine = Engine(model)
    arena = Arena(engine, tokenizer, game, rules, judge)
    rng = random.Random(0)
    seconds: dict[str, float] = {}
    scenarios = [game.sample(rng, "train") for _ in range(max(1, dialogues // 8))]
    arena.play(scenarios[:1], group_size=2, seed=1)  # warm
    backend.texts.clear()
    before = (engine.stats.steps, engine.stats.prefill_tokens, engine.stats.decode_tokens)
    with clocked(seconds, "rollout"):
        groups = arena.play(scenarios, group_size=min(8, dialogues), seed=0)
    assign_rewards(game, [d for group in groups for d in group.dialogues])
    steps, prefill, decode = (
        now - then
        for now, then in zip(
            (engine.stats.steps, engine.stats.prefill_tokens, engine.stats.decode_tokens), before, strict=True
        )
    )
    rows, _ = grpo_rows(groups, GrpoSection(group_size=8), RunningBaseline())
    with clocked(seconds, "update"):
        stats = accumulate_policy_gradient(model, rows, LossConfig(), temperature=0.7, max_tokens=16_384)
    views = [view for group in groups for d in group.dialogues for view in d.views]
    held = [d for group in groups for d in group.dialogues]
    weights = sum(p.numel() for p in model.parameters())
    counts = Counts(
        dialogues=len(held),
        steps=steps,
        prefill=prefill,
        decode=decode,
        update=stats.tokens,
        context=sum(len(v.token_ids) for v in views) / len(views),
        judge_requests=len(backend.texts),
        judge_prompt=sum(len(tokenizer.encode(text)) for text in backend.texts),
        judge_rounds=rounds + 1,
    )
    return (
        counts,
        seconds,
        Shape(name="4.2M fp32", weights=weights, bytes_=4 * weights, kv_bytes=token_bytes(model)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialogues", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="after which the judge finds an agreement")
    parser.add_argument(
        "--tokens", type=int, default=64, help="of a turn in the run here; the final has twice as many"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="add the row to bench/results/cost.csv")
    args = parser.parse_args()
    if args.dialogues < 1 or args.rounds < 1 or args.tokens < 1:
        parser.error("--dialogues, --rounds and --tokens: accepted is 1 or more")
    lengths = {"max_tokens_per_turn": args.tokens, "max_tokens_final": 2 * args.tokens}
    counts, seconds, shape = play(args.dialogues, args.rounds, lengths)
    bandwidth, rate = ceilings("cpu")
    here = predict(counts, shape, bandwidth, rate)
    rollout = here["prefill"] + here["decode"]
    there = predict(counts.longer(LENGTHS["max_tokens_per_turn"] / args.tokens), QWEN3_14B, *H200)
    n = counts.dialogues
    row = {
        "dialogues": n,
        "rounds": args.rounds,
        "tokens_per_turn": args.tokens,
        "requests_per_dialogue": round(counts.judge_requests / n, 2),
        "judge_tokens_per_dialogue": round(counts.judge_prompt / n),
        "prefill_tokens_per_dialogue": round(counts.prefill / n),
        "decoded_tokens_per_dialogue": round(counts.decode / n),
        "rollout_seconds": round(seconds["rollout"], 3),
        "rollout_predicted": round(rollout, 3),
        "rollout_share": round(rollout / seconds["rollout"], 2),
        "update_seconds": round(seconds["update"], 3),
        "update_predicted": round(here["update"], 3),
        "update_share": round(here["update"] / seconds["update"], 2),
        **{f"h200_14b_{key.split()[0]}_s_per_dialogue": round(value / n, 3) for key, value in there.items()},
        "h200_14b_s_per_dialogue": round(sum(there.values()) / n, 2),
    }
    share = max(0.05, min(1.0, rollout / seconds["rollout"]))
    row["h200_14b_s_per_dialogue_at_this_share"] = round(sum(there.values()) / n / share, 2)
    if not args.json:
        print("\n".join(f"{key:44} {value}" for key, value in row.items()))
    if args.save:
        append_rows("cost", [row])
    print(json.dumps({"bench": "cost", "rows": [row]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
