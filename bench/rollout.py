"""Rollout throughput beside transformers' `generate`: same weights, same prompts, one process.

    python -m bench.rollout [--only ours] [--json] [--save]   from the root, after `pip install -e '.[bench]'`

Prompts of 64 tokens, 64 new tokens, sampled. Both sides run on all cores; they take turns, so that both see
the same machine. The ceiling is the larger of two times per step: reading every weight once at the measured
copy bandwidth, and multiplying them at the measured rate of the best matrix product of this shape's dtype.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duologue.kernels import backend
from duologue.model.checkpoint import load_weights, parse_dtype, read_config
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams

from bench.common import append_rows, copy_bandwidth, product_rate, tokens_per_second

SHAPES: dict[str, dict[str, Any]] = {
    "4.2M": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "vocab_size": 4096,
        "dtype": "float32",
    },
    "91M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2304,
        "vocab_size": 8192,
        "dtype": "bfloat16",
    },
}
PROMPT, NEW = 64, 64


def make_checkpoint(shape: dict[str, Any], folder: Path, max_positions: int = 512) -> Any:
    """A random Qwen3 checkpoint in `folder`, and transformers' model of it."""
    import transformers

    sizes = {k: v for k, v in shape.items() if k != "dtype"}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **sizes,
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    model = transformers.Qwen3ForCausalLM(config).to(parse_dtype(shape["dtype"])).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def load_ours(shape: dict[str, Any], folder: Path, device: str) -> Decoder:
    model = Decoder(read_config(folder))
    load_weights(model, folder, device, parse_dtype(shape["dtype"]))
    return model


def ceiling(model: Decoder, batch: int) -> float:
    """Tokens per second that the weights' bytes and multiplications allow, both rates measured here and
    now."""
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
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=0,
                eos_token_id=None,
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
        with tempfile.TemporaryDirectory() as folder:
            theirs = make_checkpoint(SHAPES[name], Path(folder))
            model = load_ours(SHAPES[name], Path(folder), "cpu")
            for batch in args.batches:
                rows.append(bench(name, batch, args.repeats, args.only == "ours", theirs, model))
                if not args.json:
                    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.save:
        append_rows("rollout", rows)
    print(json.dumps({"bench": "rollout", "backend": backend.describe(), "rows": rows}))


if __name__ == "__main__":
    main()
