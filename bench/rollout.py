"""Rollout throughput beside transformers' `generate`: same weights, same prompts, one process.

    python -m bench.rollout [--only ours] [--json] [--save]  # at the root; needs `pip install -e '.[bench]'`
    python -m bench.rollout --checkpoint FOLDER [--prefill 256]  # a real model in bf16; or its prompts alone
    python -m bench.rollout --checkpoint FOLDER --peer llamacpp --gguf FILE  # and llama.cpp

Prompts of 64 tokens, 64 new tokens, sampled; `--prefill N` computes prompts of N tokens and samples nothing.
Both sides run on all cores; they take turns, so that both see the same machine. The ceiling is the larger of
two times per step: reading every weight once at the measured copy bandwidth, and multiplying them at the
measured rate of the best matrix product of this shape's dtype. `--one-core` is for a busy machine: one thread
on either side, and the processor's time in place of the clock's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duologue.kernels import backend
from duologue.model.checkpoint import load_model
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench import llamacpp
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


def new_tokens(
    model: Decoder, theirs: Any, prompts: torch.Tensor
) -> tuple[Callable[[], int], Callable[[], int]]:
    """A call of each side that samples NEW tokens behind each prompt and returns how many."""
    engine = Engine(model, cache_tokens=max(len(prompts), 4) * (prompts.shape[1] + NEW + 16))
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
        return int(out[:, prompts.shape[1] :].numel())

    return ours, transformers_generate


def prefill(
    model: Decoder, theirs: Any, prompts: torch.Tensor
) -> tuple[Callable[[], int], Callable[[], int]]:
    """A call of each side that computes the prompts' keys and values and returns how many tokens they are."""
    engine = Engine(model, cache_tokens=len(prompts) * (prompts.shape[1] + 16))

    def ours() -> int:
        branches = [engine.open(prompt) for prompt in prompts.tolist()]
        engine.prefill(branches)
        for branch in branches:
            branch.close()
        return prompts.numel()

    def transformers_forward() -> int:
        with torch.no_grad():
            theirs(prompts, use_cache=True, logits_to_keep=1)
        return prompts.numel()

    return ours, transformers_forward


def bench(name: str, batch: int, args: argparse.Namespace, theirs: Any, model: Decoder) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    size = (batch, args.prefill or PROMPT)
    prompts = torch.randint(0, model.config.vocab_size, size, generator=generator)
    sides = (prefill if args.prefill else new_tokens)(model, theirs, prompts)
    runs = dict(zip(("ours", "transformers"), sides, strict=True))
    if args.only == "ours":
        del runs["transformers"]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    row: dict[str, Any] = {"model": name, "dtype": dtype, "batch": batch}
    if args.prefill:
        row["prompt_tokens"] = args.prefill
    clock = time.process_time if args.one_core else time.perf_counter
    with contextlib.ExitStack() as stack:
        if args.peer == "llamacpp":
            threads = 1 if args.one_core else torch.get_num_threads()
            new = 0 if args.prefill else NEW
            runs |= stack.enter_context(llamacpp.peers(args.gguf, prompts, new, threads))
        speeds = tokens_per_second(runs, args.repeats, clock)
    for side, speed in speeds.items():
        row[f"{side}_tokens_per_s"] = round(speed, 1)
        if side.startswith("llamacpp"):
            row[f"of_{side}"] = round(speeds["ours"] / speed, 2)
    if args.only != "ours":
        row["ratio"] = round(row["ours_tokens_per_s"] / row["transformers_tokens_per_s"], 2)
    if not args.prefill:  # the rates behind it are by the clock
        row["share_of_ceiling"] = (
            None if args.one_core else round(row["ours_tokens_per_s"] / ceiling(model, batch), 3)
        )
    return row


def from_checkpoint(folder: Path) -> tuple[Any, Decoder]:
    """transformers' model of a checkpoint and ours, in bf16."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs.generation_config.eos_token_id = None
    return theirs, load_model(folder, "cpu", torch.bfloat16)[0]


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
    parser.add_argument(
        "--checkpoint", type=Path, help="a folder as transformers writes it, in place of --models"
    )
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt; nothing is sampled")
    parser.add_argument("--peer", choices=["llamacpp"], help="beside transformers; needs llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp runs")
    parser.add_argument("--one-core", action="store_true", help="one thread, in processor time")
    args = parser.parse_args()
    if args.peer and (args.gguf is None or not args.gguf.is_file()):
        parser.error(f"--gguf {args.gguf}: accepted is the GGUF file of --checkpoint's weights")
    if args.one_core:
        torch.set_num_threads(1)
        backend.lib().set_threads(1)
    rows = []
    for name in [args.checkpoint.name] if args.checkpoint else args.models:
        theirs, model = from_checkpoint(args.checkpoint) if args.checkpoint else both(name, "cpu")
        for batch in args.batches:
            rows.append(bench(name, batch, args, theirs, model))
            if not args.json:
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.save:
        append_rows(("prefill" if args.prefill else "rollout") + ("_llamacpp" if args.peer else ""), rows)
    print(json.dumps({"bench": "rollout", "backend": backend.describe(), "rows": rows}))


if __name__ == "__main__":
    main()
