"""Two-persona dialogues on the engine beside a plain transformers loop, and what turns, groups and context
cost.

    python bench/dialogues.py [--only ours] [--json] [--save] [--turns 6] [--tokens 48] [--groups 1]
    python bench/dialogues.py --device cuda --model 0.6B --only ours --groups 16

A dialogue: a shared scenario of 256 tokens, 16 private ones per side, then six turns of 48 tokens in which
the sides alternate; G = 8 dialogues per scenario. Ours keeps both sides' KV between turns and computes the
scenario once for all. The loop feeds each turn's whole context to `generate`, batched over all dialogues.
Both sample; tokens per second count sampled tokens only. Random Qwen3 weights, 4.2M.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.kernels import backend
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Branch, SamplingParams

from bench.common import append_rows, tokens_per_second
from bench.rollout import SHAPES, load_ours, make_checkpoint
from bench.workload import QWEN3, qwen3

PRIVATE = 16


def contexts(vocab: int, scenario: int, groups: int) -> list[tuple[list[int], list[int]]]:
    """The opening ids of both sides, per group: the shared scenario first."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(groups):
        shared = torch.randint(0, vocab, (scenario,), generator=g).tolist()
        first, second = (torch.randint(0, vocab, (PRIVATE,), generator=g).tolist() for _ in range(2))
        made.append((shared + first, shared + second))
    return made


def play(
    engine: Engine, opening: list[tuple[list[int], list[int]]], G: int, turns: int, tokens: int
) -> tuple[int, list[float]]:
    """(sampled tokens, seconds of each turn)."""
    bases = [(engine.open(first), engine.open(second)) for first, second in opening]
    engine.prefill([branch for pair in bases for branch in pair])
    tables: list[tuple[list[Branch], list[Branch]]] = [(a.fork(G), b.fork(G)) for a, b in bases]
    for pair in bases:
        for branch in pair:
            branch.close()
    sides = ([b for t in tables for b in t[0]], [b for t in tables for b in t[1]])
    params, seconds = SamplingParams(max_new_tokens=tokens), []
    for turn in range(turns):
        began = time.perf_counter()
        speakers, listeners = sides[turn % 2], sides[1 - turn % 2]
        requests = [engine.start(branch, params) for branch in speakers]
        engine.run()
        for listener, request in zip(listeners, requests, strict=True):
            listener.append(request.completion.token_ids)
        seconds.append(time.perf_counter() - began)
    for branch in (*sides[0], *sides[1]):
        branch.close()
    return len(sides[0]) * turns * tokens, seconds


def loop(theirs: Any, opening: list[tuple[list[int], list[int]]], G: int, turns: int, tokens: int) -> int:
    views = [torch.tensor([ids[side] for ids in opening for _ in range(G)]) for side in range(2)]
    for turn in range(turns):
        ids = views[turn % 2].to(theirs.device)
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=0,
                eos_token_id=None,
            )
        said = out[:, ids.shape[1] :].cpu()
        views = [torch.cat((view, said), 1) for view in views]
    return len(views[0]) * turns * tokens


def engine_for(model: Decoder, dialogues: int, length: int) -> Engine:
    return Engine(model, cache_tokens=(2 * dialogues + 4) * (length + 32), max_batch=max(dialogues, 8))


def compare(model: Decoder, theirs: Any, args: argparse.Namespace) -> dict[str, Any]:
    opening = contexts(model.config.vocab_size, 256, args.groups)
    engine = engine_for(model, args.groups * 8, 256 + PRIVATE + args.turns * args.tokens)
    runs = {"ours": lambda: play(engine, opening, 8, args.turns, args.tokens)[0]}
    if args.only is None:
        runs["transformers"] = lambda: loop(theirs, opening, 8, args.turns, args.tokens)
    speeds = tokens_per_second(runs, args.repeats)
    row: dict[str, Any] = {
        "case": "dialogues",
        "model": args.model,
        "groups": args.groups,
        "G": 8,
        "turns": args.turns,
    }
    row["tokens"] = args.tokens
    row |= {f"{side}_tokens_per_s": round(speed, 1) for side, speed in speeds.items()}
    if "transformers" in speeds:
        row["ratio"] = round(row["ours_tokens_per_s"] / row["transformers_tokens_per_s"], 2)
    return row | {
        "shared_tokens": engine.stats.shared_tokens,
        "idle_slot_share": round(engine.stats.idle_slot_steps / max(engine.stats.slot_steps, 1), 3),
    }


def costs(model: Decoder, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds per turn as turns, the group and the scenario grow; and the tokens computed that were not
    sampled."""
    rows = []
    vocab = model.config.vocab_size
    cases = [("turns", 8, 256, n) for n in (2, 4, 8, 12)]
    cases += [("group", n, 256, 4) for n in (1, 2, 4, 16)] + [("scenario", 8, n, 4) for n in (64, 1024)]
    for what, G, scenario, turns in cases:
        opening = contexts(vocab, scenario, 1)
        engine = engine_for(model, G, scenario + PRIVATE + turns * args.tokens)
        play(engine, opening, G, turns, args.tokens)
        before = engine.stats.prefill_tokens
        _, seconds = play(engine, opening, G, turns, args.tokens)
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
    theirs = None
    if args.model in QWEN3:
        if args.only is None:
            parser.error(
                f"--model {args.model}: its weights are made here, without transformers; add --only ours"
            )
        model = qwen3(args.model, args.device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            theirs = make_checkpoint(SHAPES[args.model], Path(folder), max_positions=4096).to(args.device)
            model = load_ours(SHAPES[args.model], Path(folder), args.device)
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
