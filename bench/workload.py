"""The common rollout workload: sequences of many lengths at once. Ours beside transformers, and the roofline.

    python -m bench.workload [--model 4.2M] [--sequences 64] [--shortest 12 --longest 128]
                             [--only ours] [--json] [--save]

On a GPU: python -m bench.workload --device cuda --model 0.6B --sequences 256 --shortest 100 --longest 1024
                                   --only ours

Prompt and output lengths are uniform between the two bounds; ids and weights are random. Peers get the same:
`generate` in batches sorted by length, whose rows all run to the batch's longest output; and transformers'
continuous batching. Tokens per second count what was asked for. The ideal reads the weights once per step and
each live sequence's KV, or multiplies the weights, whichever takes longer, at the rates measured here.
nano-vllm reports 1,434 tokens/s against vLLM's 1,362 for 0.6B on a laptop RTX 4070.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.kernels import backend
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.runner import token_bytes
from duologue.rollout.engine.sequence import SamplingParams

from bench.common import append_rows, calls, ceilings, tokens_per_second
from bench.models import QWEN3, SAMPLED, SHAPES, chosen

PAGE = 256  # tokens of transformers' cache, as by default


def lengths(n: int, shortest: int, longest: int) -> tuple[list[int], list[int]]:
    """Of n prompts, and of what follows each."""
    generator = torch.Generator().manual_seed(0)
    of_prompts, of_outputs = torch.randint(shortest, longest + 1, (2, n), generator=generator).tolist()
    return of_prompts, of_outputs


def run_ours(engine: Engine, prompts: list[list[int]], out: list[int]) -> int:
    completions = engine.generate(prompts, [SamplingParams(max_new_tokens=n) for n in out])
    assert [len(c.token_ids) for c in completions] == out
    return sum(out)


def run_generate(theirs: Any, prompts: list[list[int]], out: list[int], batch: int) -> int:
    """Left-padded batches of similar output lengths."""
    order = sorted(range(len(prompts)), key=lambda i: out[i])
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for r, i in enumerate(rows):
            ids[r, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[r, width - len(prompts[i]) :] = 1
        with torch.no_grad():
            theirs.generate(
                ids.to(theirs.device),
                attention_mask=mask.to(theirs.device),
                max_new_tokens=max(out[i] for i in rows),
                **SAMPLED,
            )
    return sum(out)


def run_continuous(theirs: Any, prompts: list[list[int]], out: list[int]) -> int:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # All at once fit; by itself it takes most of the machine's memory, whose pages are cleared first.
    blocks = sum(-(-(len(ids) + n) // PAGE) for ids, n in zip(prompts, out, strict=True))
    cache = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks + 8)
    settings = GenerationConfig(
        max_new_tokens=max(out), do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )
    asked = {}
    how = {"generation_config": settings, "continuous_batching_config": cache, "warmup": False}
    with theirs.continuous_batching_context_manager(**how) as manager:
        for ids, n in zip(prompts, out, strict=True):
            asked[manager.add_request(ids, max_new_tokens=n)] = n
        tokens = 0
        while asked:
            result = manager.get_result(timeout=600)
            if result is None:
                raise RuntimeError("transformers' continuous batching gave nothing for ten minutes")
            if result.is_finished() and result.request_id in asked:
                tokens += len(result.generated_tokens)
                del asked[result.request_id]
    assert tokens == sum(out)
    return tokens


def ideal_seconds(
    model: Decoder, prompts: list[list[int]], out: list[int], bandwidth: float, rate: float
) -> float:
    """All at once: prompts at the rate of a product, then a step for each token of the longest output."""
    weights = [
        p
        for name, p in model.named_parameters()
        if p.dim() == 2 and ("embed" not in name or model.lm_head is None)
    ]
    size, count, kv = sum(p.nbytes for p in weights), sum(p.numel() for p in weights), token_bytes(model)
    seconds = 2 * count * sum(map(len, prompts)) / rate
    for step in range(max(out)):
        live = [len(p) + step for p, n in zip(prompts, out, strict=True) if n > step]
        seconds += max((size + kv * sum(live)) / bandwidth, 2 * count * len(live) / rate)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=[*SHAPES, *QWEN3], default="4.2M")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=12)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="of transformers' generate")
    parser.add_argument(
        "--fast", action="store_true", help="exact = false: libraries instead of our kernels, on a GPU"
    )
    parser.add_argument("--only", choices=["ours"], help="leave transformers out")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--save", action="store_true", help="add the row to bench/results/workload.csv")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not 1 <= args.shortest <= args.longest:
        parser.error(
            f"--shortest {args.shortest} --longest {args.longest}: accepted is 1 <= shortest <= longest"
        )
    theirs, model = chosen(parser, args, max_positions=2 * args.longest + 64)
    model.use_exact(not args.fast)
    n_in, out = lengths(args.sequences, args.shortest, args.longest)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in n_in]
    engine = Engine(
        model,
        cache_tokens=sum(n_in) + sum(out) + 32 * args.sequences,
        max_batch=args.sequences,
        max_step_tokens=2048,
    )
    runs: dict[str, Any] = {"ours": lambda: run_ours(engine, prompts, out)}
    if theirs is not None and args.only is None:
        runs["generate"] = lambda: run_generate(theirs, prompts, out, args.batch)
        runs["continuous"] = lambda: run_continuous(theirs, prompts, out)
    bandwidth, rate = ceilings(args.device)
    row: dict[str, Any] = {
        "model": args.model,
        "device_type": args.device,
        "exact": not args.fast,
        "sequences": args.sequences,
    }
    row |= {"shortest": args.shortest, "longest": args.longest}
    continuous = runs.pop("continuous", None)
    speeds = tokens_per_second(runs, args.repeats)
    if continuous is not None:  # once, and without a warm-up: its start takes seconds of threads
        speeds["continuous"] = sum(out) / calls(continuous, seconds=0, fewest=1, warm_up=0)[0]
    for side, speed in speeds.items():
        row[f"{side}_tokens_per_s"] = float(f"{speed:.4g}")
        if side != "ours":
            row[f"of_{side}"] = round(row["ours_tokens_per_s"] / row[f"{side}_tokens_per_s"], 2)
    again = ceilings(args.device)  # the machine may have been slow at first
    bandwidth, rate = max(bandwidth, again[0]), max(rate, again[1])
    row["share_of_ideal"] = round(
        row["ours_tokens_per_s"] * ideal_seconds(model, prompts, out, bandwidth, rate) / sum(out), 3
    )
    stats = engine.stats
    if args.device != "cpu":  # nearly all is decoding: what is not spent in host syncs is the host's own work
        began, before = time.perf_counter(), stats.waited_seconds
        run_ours(engine, prompts, out)
        blocked = stats.waited_seconds - before
        row["host_share"] = round(1 - blocked / (time.perf_counter() - began), 3)
    row["idle_slot_share"] = round(stats.idle_slot_steps / max(stats.slot_steps, 1), 3)
    if not args.json:
        print("\n".join(f"{key:24} {value}" for key, value in row.items()), flush=True)
    if args.save:
        append_rows("workload", [row])
    print(json.dumps({"bench": "workload", "backend": backend.describe(), "rows": [row]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
