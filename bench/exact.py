"""Counts log-probs of the rollout that are not, bit for bit, those of the training forward.

    python bench/exact.py [--tokens 1000000] [--dtype float32] [--seed 0] [--json]
    python bench/exact.py --checkpoint DIR [--lora] [--tokens 100000]   # on a real model in its dtype
    python bench/exact.py --run DIR...   # what training runs have compared themselves

Random dialogues on random weights: batches of 1 to 256, groups that fork from a shared prompt, up to six
turns with rewinds between them, chunked prefill among decoding rows, and in every other round a pool so small
that requests are preempted. Each sampled token's recorded log-prob is compared with `score`, the packed
training forward. Exit code 1 when one differs.

A run compares every log-prob that it trains, in the update itself: `mismatch` of metrics.jsonl is the largest
difference of a step. `--run` adds up how many these were, from dialogues.jsonl: all tokens of the policy's
trained turns but those of an advantage of 0, which no update computes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.config import load_config
from duologue.grpo.run_dir import read_lines
from duologue.kernels import backend
from duologue.model.checkpoint import load_model
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import SamplingParams

VOCAB = 503


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


def play_round(model: Decoder | LoraDecoder, rng: random.Random, tally: Tally) -> None:
    tight = tally.rounds % 2 == 1  # all want to run and few fit
    batch = rng.choice([33, 64, 256] if tight else [1, 2, 3, 7, 16, 128])
    turns, group, vocab = rng.randint(1, 6), rng.choice([1, 4, 8]), model.config.vocab_size
    engine = Engine(
        model,
        cache_tokens=1024 if tight else 131_072,
        max_batch=256 if tight else rng.choice([4, 32, 256]),
        max_step_tokens=rng.choice([48, 256, 1024]),
        seed=rng.randrange(2**31),
    )
    branches: list[Branch] = []
    while len(branches) < batch:
        base = engine.open([rng.randrange(vocab) for _ in range(rng.randint(1, 90))])
        engine.prefill([base])
        branches += [base, *base.fork(min(group, batch - len(branches)) - 1)]
    spans: list[list[tuple[int, list[float]]]] = [[] for _ in branches]
    for _ in range(turns):
        speaking = [i for i in range(batch) if rng.random() < 0.9]
        for i in speaking:
            branches[i].append([rng.randrange(vocab) for _ in range(rng.randint(1, 40))])
        params = [SamplingParams(max_new_tokens=rng.randint(1, 24)) for _ in speaking]
        started = [
            (i, len(branches[i]), engine.start(branches[i], p)) for i, p in zip(speaking, params, strict=True)
        ]
        engine.run()
        for i, at, request in started:
            spans[i].append((at, request.completion.logprobs))
            n = len(request.completion.token_ids)
            if rng.random() < 0.1:  # take back a part of it
                branches[i].rewind(back := rng.randint(0, n))
                spans[i][-1] = (at, request.completion.logprobs[: n - back])
    with torch.no_grad():
        for start in range(0, batch, 32):
            part = range(start, min(start + 32, batch))
            for i, exact in zip(part, score(model, [branches[i].token_ids for i in part]), strict=True):
                for at, logprobs in spans[i]:
                    of_training = exact[at - 1 : at - 1 + len(logprobs)]
                    tally.differing += int((torch.tensor(logprobs) != of_training).sum())
                    tally.tokens += len(logprobs)
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
    while tally.tokens < args.tokens:
        play_round(model, rng, tally)
        if not args.json:
            print(
                f"{tally.tokens:,} tokens, {tally.differing} differ, {tally.preemptions} preemptions",
                flush=True,
            )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    row = {"bench": "exact", "backend": backend.describe(), "dtype": dtype, **asdict(tally)}
    print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}))
    return int(tally.differing > 0)


if __name__ == "__main__":
    sys.exit(main())
