"""Rollout throughput beside transformers' `generate`: same weights, same prompts, one process.

    python -m bench.rollout [--only ours] [--json] [--save]  # at the root; needs `pip install -e '.[bench]'`

Prompts of 64 tokens, 64 new tokens, sampled. Both sides run on all cores; they take turns, so that both see
the same machine. The ceiling is the larger of two times per step: reading every weight once at the measured
copy bandwidth, and multiplying them at the measured rate of the best matrix product of this shape's dtype.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from duologue.kernels import backend
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench.common import append_rows, copy_bandwidth, product_rate, tokens_per_second
from bench.models import SAMPLED, SHAPES, both

PROMPT, NEW = 64, 64


def ceiling(model: Decoder, batch: int) -> float:
    """Tokens per second that the weights' bytes and multiplications allow, at rates measured here and now."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    size = sum(p.nbytes for p in weights)
    w = max(weights, key=lambda p: p.numel()).detach()
    x = torch.randn(512, w.shape[1], dtype=w.dtype, device=w.device)
    rate = product_rate(x, w)
    flops = 2 * sum(p.numel() for p in weights) * batch
    return batch / max(size / copy_bandwidth(), flops / rate)


def bench(
    name: str, batch: int, repeats: int, only_ours: bool, theirs: Any, model: Decoder
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator)
    engine = Engine(model, cache_tokens=max(batch, 4) * (PROMPT + NEW + 16))
    params = SamplingParams(max_new_tokens=NEW)

    def ours() -> int:
        return sum(len(c.token_ids) for c in engine.generate(prompts.tolist(), params))

    def transformers_generate() -> int:
        mask = torch.ones_like(prompts)
        with torch.no_grad():
            out = theirs.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=NEW,
                **SAMPLED,
            )
        return int(out[:, PROMPT:].numel())

    runs: dict[str, Callable[[], int]] = {"ours": ours}
    if not only_ours:
        runs["transformers"] = transformers_generate
    row: dict[str, Any] = {"model": name, "dtype": SHAPES[name]["dtype"], "batch": batch}
    for side, speed in tokens_per_second(runs, repeats).items():
        row[f"{side}_tokens_per_s"] = round(speed, 1)
    if not only_ours:
        row["ratio"] = round(row["ours_tokens_per_s"] / row["transformers_tokens_per_s"], 2)
    row["share_of_ceiling"] = round(row["ours_tokens_per_s"] / ceiling(model, batch), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["ours"], help="leave transformers out")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/rollout.csv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    args = parser.parse_args()
    rows = []
    for name in args.models:
        theirs, model = both(name, "cpu")
        for batch in args.batches:
            rows.append(bench(name, batch, args.repeats, args.only == "ours", theirs, model))
            if not args.json:
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.save:
        append_rows("rollout", rows)
    print(json.dumps({"bench": "rollout", "backend": backend.describe(), "rows": rows}))


if __name__ == "__main__":
    main()
