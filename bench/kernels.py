"""Every CPU kernel beside plain PyTorch and the roofline measured in the same run.

    python bench/kernels.py [--only ours] [--json] [--save]

Both sides take the memory that their last outputs freed, as in a training. The table is for people; the last
line is JSON; --save appends the rows to bench/results/kernels_cpu.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.policy import keep_freed_memory
from duologue.kernels import backend

from bench import cases_attention, cases_sparse
from bench.cases import CASES, LARGE, Case, ours, plain
from bench.common import append_rows, copy_bandwidth, quantiles, take_turns

OURS, PLAIN = cases_attention.OURS | cases_sparse.OURS, cases_attention.PLAIN | cases_sparse.PLAIN


def measure(case: Case, dtype: torch.dtype, only_ours: bool, bandwidth: float) -> list[dict[str, Any]]:
    inputs = case.make(dtype)
    our_op, torch_op = OURS.get(case.op) or ours(case), PLAIN.get(case.op) or plain(case)
    runs = {"ours": lambda: our_op(*inputs)}
    if not only_ours:
        runs["torch"] = lambda: torch_op(*inputs)
    with torch.no_grad():
        times = take_turns(runs)
    rows = []
    for provider, seconds in times.items():
        p20, p50, p80 = quantiles(seconds)
        moved = case.elements * torch.empty(0, dtype=dtype).element_size()
        rows.append(
            {
                "op": case.op,
                "provider": provider,
                "shape": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "p20_us": round(p20 * 1e6, 1),
                "p50_us": round(p50 * 1e6, 1),
                "p80_us": round(p80 * 1e6, 1),
                "gbytes_per_s": round(moved / p50 / 1e9, 1),
                "gflops_per_s": round(case.flops / p50 / 1e9, 1),
                "share_of_bandwidth": round(moved / p50 / bandwidth, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["ours"], help="leave PyTorch out")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="append to bench/results/kernels_cpu.csv")
    args = parser.parse_args()
    keep_freed_memory()
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for cases in (*CASES.values(), *cases_attention.CASES.values(), *cases_sparse.CASES.values()):
        for case in (c for c in cases if c.kind == LARGE):
            for dtype in (torch.float32, torch.bfloat16):
                measured = measure(case, dtype, args.only == "ours", bandwidth)
                rows += measured
                if args.json:
                    continue
                text = "  ".join(f"{key}={value}" for key, value in measured[0].items() if value)
                if len(measured) > 1:
                    text += f"  {measured[1]['p50_us'] / measured[0]['p50_us']:.2f}x torch"
                print(text, flush=True)
    if args.save:
        append_rows("kernels_cpu", rows)
    summary = {"bench": "kernels", "backend": backend.describe(), "copy_bytes_per_s": bandwidth}
    print(json.dumps({**summary, "rows": rows}))


if __name__ == "__main__":
    main()
