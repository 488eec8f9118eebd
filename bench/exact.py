"""Counts log-probs of the rollout that are not, bit for bit, those of the training forward.

    python bench/exact.py [--tokens 1000000] [--dtype float32] [--seed 0] [--json] [--save]
    python bench/exact.py --checkpoint DIR [--lora] [--tokens 100000]   # on a real model in its dtype
    python bench/exact.py --run DIR...   # what training runs have compared themselves

Random dialogues on random weights: batches of 1 to 256, groups that fork from a shared prompt, up to six
turns with rewinds between them, chunked prefill among decoding rows, and in every other round a pool so small
that requests are preempted. Each sampled token's recorded log-prob is compared with `score`, the packed
training forward. Exit code 1 when one differs. SIGTERM ends it after the round that is being played, with the
JSON line of what it has compared. `--save` appends that line to bench/results/exact.csv.

A run compares every log-prob that it trains, in the update itself: `mismatch` of metrics.jsonl is the largest
difference of a step. `--run` adds up how many these were, from dialogues.jsonl: all tokens of the policy's
trained turns but those of an advantage of 0, which no update computes.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.config import load_config
from duologue.grpo.run_dir import read_lines
from duologue.kernels import backend
from duologue.model.checkpoint import load_model
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench.common import append_rows

VOCAB = 503
MOST_APPENDED, MOST_NEW = 16, 32  # tokens of a turn
LONGEST = 384  # tokens of a dialogue, at least the 90 of a prompt and six turns
PACKED = 32  # sequences of a training forward
Span = tuple[int, list[float]]  # where sampled tokens begin, and their log-probs


@dataclass(kw_only=True, slots=True)
class Tally:
    tokens: int = 0
    differing: int = 0
    rounds: int = 0
    preemptions: int = 0
    shared_tokens: int = 0
    largest_batch: int = 0


def make_model(dtype: torch.dtype, seed: int) -> Decoder:
    model = Decoder(
        ModelConfig(
            model_type="qwen3",
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=160,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
        )
    )
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # far from uniform, so that log-probs differ in size
    return model.to(dtype)


def from_checkpoint(folder: Path, lora: bool, seed: int) -> Decoder | LoraDecoder:
    """Its model, with an adapter of rank 8 on every linear layer that changes what is said."""
    model, _ = load_model(folder, "cpu")
    if not lora:
        return model
    policy = LoraDecoder(model, new_adapter(model, LoraSettings(rank=8, base=str(folder)), seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in policy.adapter.pairs.values():
            b.normal_(std=0.02, generator=generator)
    return policy


def open_engine(model: Decoder | LoraDecoder, rng: random.Random, tight: bool) -> tuple[Engine, int]:
    """An engine for a round, and how many dialogues are to share it.

    Most tokens come from the large batches, which cost the least for each.
    """
    batch = rng.choice([33, 64, 256] if tight else [1, 2, 3, 7, 16, 128, 256, 256, 256])
    large = batch > 64
    if tight:  # all want to run and few fit
        cache_tokens, max_batch = batch * rng.choice([24, 48, 96]), 256
    else:
        cache_tokens, max_batch = batch * LONGEST, rng.choice([256] if large else [4, 32])
    engine = Engine(
        model,
        cache_tokens=cache_tokens,
        max_batch=max_batch,
        max_step_tokens=rng.choice([256, 1024] if large else [48, 128, 512]),
        seed=rng.randrange(2**31),
    )
    return engine, batch


def open_branches(engine: Engine, rng: random.Random, batch: int) -> list[Branch]:
    """Random prompts, each of which some branches share."""
    group, vocab = rng.choice([1, 4, 8]), engine.model.config.vocab_size
    bases = [engine.open(rng.choices(range(vocab), k=rng.randint(1, 90))) for _ in range(0, batch, group)]
    engine.prefill(bases)
    return [branch for base in bases for branch in (base, *base.fork(group - 1))][:batch]


def play_turns(engine: Engine, rng: random.Random, branches: list[Branch]) -> list[list[Span]]:
    """Up to six turns in most of the branches, some of which take back a part of a turn; the spans of each
    branch."""
    spans: list[list[Span]] = [[] for _ in branches]
    tokens = range(engine.model.config.vocab_size)
    for _ in range(rng.randint(1, 6)):
        speaking = [i for i in range(len(branches)) if rng.random() < 0.9]
        started = []
        fewest = rng.choice([1, MOST_NEW, MOST_NEW])  # all end together: several steps in one call
        for i in speaking:
            branches[i].append(rng.choices(tokens, k=rng.randint(1, MOST_APPENDED)))
            params = SamplingParams(max_new_tokens=rng.randint(fewest, MOST_NEW))
            started.append((i, len(branches[i]), engine.start(branches[i], params)))
        engine.run()
        for i, at, request in started:
            logprobs = request.completion.logprobs
            kept = len(logprobs)
            if rng.random() < 0.1:
                kept = rng.randint(0, kept)
                branches[i].rewind(len(logprobs) - kept)
            spans[i].append((at, logprobs[:kept]))
    return spans


def compare(model: Decoder | LoraDecoder, branches: list[Branch], spans: list[list[Span]]) -> tuple[int, int]:
    """(Log-probs recorded, those that differ from the packed training forward's.)"""
    recorded: list[float] = []
    exact: list[torch.Tensor] = []
    for start in range(0, len(branches), PACKED):
        with torch.no_grad():
            scored = score(model, [branch.token_ids for branch in branches[start : start + PACKED]])
        for of_branch, logprobs in zip(spans[start : start + PACKED], scored, strict=True):
            for at, of_turn in of_branch:
                recorded += of_turn
                exact.append(logprobs[at - 1 : at - 1 + len(of_turn)])
    if not exact:
        return 0, 0
    return len(recorded), int((torch.tensor(recorded) != torch.cat(exact)).sum())


def play_round(model: Decoder | LoraDecoder, rng: random.Random, tally: Tally) -> None:
    engine, batch = open_engine(model, rng, tight=tally.rounds % 2 == 1)
    branches = open_branches(engine, rng, batch)
    tokens, differing = compare(model, branches, play_turns(engine, rng, branches))
    tally.tokens += tokens
    tally.differing += differing
    tally.rounds += 1
    tally.preemptions += engine.stats.preemptions
    tally.shared_tokens += engine.stats.shared_tokens
    tally.largest_batch = max(tally.largest_batch, batch)


def compared(dialogue: dict[str, Any], kinds: tuple[str, ...]) -> int:
    """Log-probs of a recorded dialogue of self-play that its update compared."""
    players, advantage = dialogue.get("players", ("policy",) * 2), dialogue["advantage"] or (0.0, 0.0)
    roles = [role for role in (0, 1) if players[role] == "policy" and advantage[role] != 0.0]
    turns = [turn for turn in dialogue["turns"] if turn["role"] in roles and turn["kind"] in kinds]
    return sum(len(turn["logprobs"]) for turn in turns)


def of_run(folder: Path) -> dict[str, Any]:
    """How many log-probs a run compared, and how many steps had one that differed."""
    config = load_config(str(folder / "config.toml"))
    tokens: Counter[int] = Counter()
    for dialogue in read_lines(folder / "dialogues.jsonl"):
        if dialogue["stage"] == "selfplay":
            tokens[dialogue["step"]] += compared(dialogue, config.grpo.train_kinds)
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "selfplay"]
    return {
        "run": folder.name,
        "dtype": config.model.dtype,
        "instruction_sets": sorted({row.get("instruction_set", "unknown") for row in rows}),
        "steps": len(rows),
        "tokens": sum(tokens[row["step"]] for row in rows),
        "differing_steps": sum(row["mismatch"] != 0.0 for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face folder in place of random weights")
    parser.add_argument("--lora", action="store_true", help="with an adapter on it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="append to bench/results/exact.csv")
    parser.add_argument("--run", nargs="+", type=Path, help="directories of training runs")
    args = parser.parse_args()
    if args.run:
        runs = [of_run(folder) for folder in args.run]
        print(json.dumps({"bench": "exact", "tokens": sum(run["tokens"] for run in runs), "runs": runs}))
        return int(any(run["differing_steps"] for run in runs))
    rng, tally, began = random.Random(args.seed), Tally(), time.perf_counter()
    if args.checkpoint:
        model = from_checkpoint(args.checkpoint, args.lora, args.seed)
    else:
        model = make_model(getattr(torch, args.dtype), args.seed)
    gc.freeze()  # what importing torch left: else every collection walks it
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    while tally.tokens < args.tokens and not terminated:
        play_round(model, rng, tally)
        if not args.json:
            print(
                f"{tally.tokens:,} tokens, {tally.differing} differ, {tally.preemptions} preemptions",
                flush=True,
            )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    seconds = {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time(), 1)}
    model_name = f"{args.checkpoint.name}{' with an adapter' * args.lora}" if args.checkpoint else "tiny"
    row = {"model": model_name, "dtype": dtype, **asdict(tally), **seconds}
    known = {"bench": "exact", "backend": backend.describe()}
    print(json.dumps(known | row | {"wanted_tokens": args.tokens}), flush=True)
    if args.save:
        append_rows("exact", [row])
    return int(tally.differing > 0)


if __name__ == "__main__":
    sys.exit(main())
