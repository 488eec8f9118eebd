"""Memory of a step with an adapter and with all weights: what is trained, the peak, and what a frozen partner
adds.

    python -m bench.lora [--json] [--device cpu] [--model 91M] [--rank 16]

Each case is a process of its own: the policy, an engine that plays 8 rows, 4 of them the partner's where
there is one, and one update on 4 rows with the optimizer's step. `held` are the bytes of all tensors before
the update, exact; `peak` is the most memory that the process held from the engine on, without what its
imports took (resident on CPU, which varies by some 5 % from run to run; allocated on CUDA). With an adapter
the partner is the base, the adapter off, in the same engine steps; with all weights it is a second set of
weights with its own KV pool. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.config import from_dict
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.packing import Row
from duologue.grpo.policy import use_device
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench.models import SHAPES, alone

ROWS, PROMPT, NEW, CACHE = 4, 32, 32, 4096
SIZES = ("weights", "trained", "optimizer", "held", "peak")
CASES = [("all weights", False), ("all weights", True), ("adapter", False), ("adapter", True)]


def memory(device: str, peak: bool) -> int:
    """Bytes held now, or at most so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return (
        next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:" if peak else "VmRSS:")) * 1024
    )


def forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def size(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def held() -> int:
    """Bytes of the storages of all tensors."""
    storages = (
        t.untyped_storage()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor) and t.device.type != "meta"
    )
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure(name: str, rank: int, trains: str, partner: bool, device: str) -> dict[str, Any]:
    use_device(from_dict({"model": {"device": device}}))
    before = memory(device, peak=False)
    model = alone(name, device)
    if trains == "adapter":
        model = LoraDecoder(model, new_adapter(model, LoraSettings(rank=rank, alpha=2.0 * rank), 0))
    forget_peak(device)
    engine = other = Engine(model, cache_tokens=CACHE)
    if partner and isinstance(model, LoraDecoder):
        engine.use_adapters([None])
    elif partner:
        other = Engine(copy.deepcopy(model).requires_grad_(False), cache_tokens=CACHE)
    prompts = torch.randint(
        10, model.config.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0)
    ).tolist()
    params = SamplingParams(max_new_tokens=NEW)
    own = [engine.start(engine.open(prompt), params) for prompt in prompts]
    for prompt in prompts:
        other.start(other.open(prompt[::-1], int(partner and isinstance(model, LoraDecoder))), params)
    engine.run()
    other.run()
    optimizer = Optimizer(model, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
    rows = [
        Row(
            token_ids=request.branch.token_ids,
            loss_mask=[False] * PROMPT + [True] * NEW,
            advantage=(-1.0) ** i,
            dialogue_id=i,
            role=0,
            logprobs=[0.0] * PROMPT + request.completion.logprobs,
            supports=None,
        )
        for i, request in enumerate(own)
    ]
    began, held_bytes = time.perf_counter(), held()
    accumulate_policy_gradient(
        model, rows, LossConfig(), temperature=1.0, max_tokens=4096, after_part=optimizer.accumulate
    )
    optimizer.step(1e-5)
    return {
        "trains": trains,
        "partner": partner,
        "weights_bytes": size(model.parameters()),
        "trained_bytes": size(p for p in model.parameters() if p.requires_grad),
        "optimizer_bytes": size(optimizer.state_dict().values()),
        "held_bytes": held_bytes,
        "peak_bytes": memory(device, peak=True) - before,
        "update_seconds": round(time.perf_counter() - began, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), default="91M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args.model, args.rank, *CASES[args.case], args.device)))
        return
    if not args.json:
        print(f"{args.model}, {SHAPES[args.model]['dtype']}, rank {args.rank}; MB")
        print(
            f"{'trains':12} {'frozen partner':14} "
            + "".join(f"{key:>10}" for key in SIZES)
            + f"{'update s':>10}"
        )
    rows = []
    for case in range(len(CASES)):
        words = [
            "--case",
            str(case),
            "--device",
            args.device,
            "--model",
            args.model,
            "--rank",
            str(args.rank),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "bench.lora", *words], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(row := json.loads(done.stdout))
        if not args.json:
            sizes = "".join(f"{row[f'{key}_bytes'] / 1e6:10.1f}" for key in SIZES)
            partner = "yes" if row["partner"] else "no"
            print(f"{row['trains']:12} {partner:14} {sizes}{row['update_seconds']:10.2f}", flush=True)
    added = {
        trains: with_it["held_bytes"] - without["held_bytes"]
        for trains, without, with_it in (("all weights", *rows[:2]), ("adapter", *rows[2:]))
    }
    print(
        json.dumps(
            {
                "bench": "lora",
                "model": args.model,
                "rank": args.rank,
                "partner_adds_bytes": added,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
