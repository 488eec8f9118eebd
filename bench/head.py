"""The policy gradient from hidden states: ours in three products, plain PyTorch, and TRL's chunked log-probs.
CPU, fp32.

    python bench/head.py [--only ours] [--json] [--save]      from the root, after `pip install -e '.[bench]'`

N = 4,096 rows, forward and backward of a clipped policy loss, gradients in hidden states and weight. The
sides take turns in one process on the same inputs. Memory is the largest growth of the resident set during a
call in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from duologue.kernels import backend, ops

from bench.common import append_rows, quantiles, take_turns

N = 4096
SHAPES = [(256, 4096), (768, 4096), (256, 32768), (768, 32768)]  # H, V


def make(H: int, V: int, active: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    advantage = torch.randn(N, generator=g) * (torch.rand(N, generator=g) < active)
    return {
        "hidden": torch.randn(N, H, generator=g).requires_grad_(),
        "weight": (torch.randn(V, H, generator=g) * H**-0.5).requires_grad_(),
        "targets": torch.randint(0, V, (N,), generator=g),
        "advantage": advantage,
        "old": torch.full((N,), -8.0),
        "segments": torch.zeros(N, dtype=torch.int64),
    }


def loss(x: dict[str, Tensor], logp: Tensor, entropy: Tensor, rows: slice, config: LossConfig) -> Tensor:
    total = Normaliser(tokens=float(N), rows=1.0)
    old = logp.detach() + 0.01  # nearly on policy, so that nothing is clipped
    return policy_loss(
        config, logp, old, x["advantage"][rows], x["segments"][rows], 1, total, entropy=entropy
    )[0]


def ours(x: dict[str, Tensor], config: LossConfig) -> None:
    args = x["hidden"], x["weight"], x["targets"]
    ops.linear_policy_loss(
        *args, lambda logp, entropy, rows: loss(x, logp, entropy, rows, config)
    ).loss.backward()


def plain(x: dict[str, Tensor], config: LossConfig) -> None:
    logp = torch.nn.functional.linear(x["hidden"], x["weight"]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1) if config.entropy_coef else logp[:, 0]
    loss(x, logp.gather(1, x["targets"].unsqueeze(1)).squeeze(1), entropy, slice(0, N), config).backward()


def trl(x: dict[str, Tensor], config: LossConfig) -> None:
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("entropy",) if config.entropy_coef else ()
    chunk = 32768  # as its trainer calls it
    got = ChunkedLogProbFunction.apply(
        x["hidden"], x["weight"], None, x["targets"], 1.0, chunk, None, 1.0, outputs
    )
    loss(x, got[0], got[1] if config.entropy_coef else got[0], slice(0, N), config).backward()


SIDES: dict[str, Callable[[dict[str, Tensor], LossConfig], None]] = {
    "ours": ours,
    "pytorch": plain,
    "trl_chunked": trl,
}


def _grow(side: str, H: int, V: int, config: LossConfig, threads: int, out: Any) -> None:
    """Largest growth of the resident set in a call, of a fresh process that has made one small call."""
    torch.set_num_threads(threads)
    x = make(H, V, 1.0)
    SIDES[side](make(8, 64, 1.0), config)
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    SIDES[side](x, config)
    done.set()
    watcher.join()
    out.put(peak - before)


def memory(side: str, H: int, V: int, config: LossConfig) -> float:
    """MB."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_grow, args=(side, H, V, config, torch.get_num_threads(), out))
    child.start()
    grown = out.get(timeout=300)
    child.join()
    return float(grown) / 2**20


def bench(
    H: int, V: int, sides: list[str], repeats: int, config: LossConfig, active: float
) -> dict[str, Any]:
    x = make(H, V, active)

    def run(side: str) -> None:
        x["hidden"].grad = None
        x["weight"].grad = None
        SIDES[side](x, config)

    seconds = take_turns({side: partial(run, side) for side in sides}, rounds=repeats, seconds=0)
    row: dict[str, Any] = {
        "op": "linear_policy_loss",
        "N": N,
        "H": H,
        "V": V,
        "dtype": "float32",
        "entropy": config.entropy_coef > 0,
        "active": active,
    }
    for side in sides:
        p20, p50, p80 = quantiles(seconds[side])
        row |= {f"{side}_p20_s": round(p20, 4), f"{side}_s": round(p50, 4), f"{side}_p80_s": round(p80, 4)}
    row["ours_gflops"] = round(6 * N * H * V * active / row["ours_s"] / 1e9, 1)
    for side in sides[1:]:
        row[f"of_{side}"] = round(row["ours_s"] / row[f"{side}_s"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["ours"], help="leave the others out")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/head.csv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--active", type=float, default=1.0, help="share of rows with an advantage")
    parser.add_argument("--entropy", type=float, default=0.0, help="coefficient of the entropy bonus")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("H", "V"), help="this one only")
    args = parser.parse_args()
    sides = ["ours"] if args.only else list(SIDES)
    config = LossConfig(entropy_coef=args.entropy)
    rows = []
    for H, V in [tuple(args.shape)] if args.shape else SHAPES:
        row = bench(H, V, sides, args.repeats, config, args.active)
        row |= {f"{side}_mb": round(memory(side, H, V, config)) for side in sides}
        rows.append(row)
        if not args.json:
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.save:
        append_rows("head", rows)
    print(json.dumps({"bench": "head", "backend": backend.describe(), "rows": rows}))


if __name__ == "__main__":
    main()
