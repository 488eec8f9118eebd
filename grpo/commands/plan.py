"""What a run would take of each rank's memory, printed before anybody rents a machine."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from duologue.grpo import plan
from duologue.grpo.config import Config, load_config
from duologue.grpo.microbatch import tokens_that_fit, with_tokens
from duologue.grpo.plan import GB, Plan
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results" / "rollout.csv"
KINDS = {
    "weights": "weights",
    "gradients": "gradients, fp32 sums",
    "masters": "fp32 masters",
    "moments": "moments",
    "activations": "activations of a micro-batch",
    "again": "a layer computed a second time",
    "head": "head",
    "transit": "gradients in transit",
    "pool": "KV pool",
    "frozen": "frozen copies",
    "graphs": "graphs and context (assumed)",
    "copy": "a checkpoint that is written",
}


def run(options: argparse.Namespace) -> int:
    """Print the plan; 1 when it does not fit."""
    if options.ranks < 1 or options.gpu_memory <= 0:
        value = f"--ranks {options.ranks} --gpu-memory {options.gpu_memory:g}"
        raise ValueError(f"{value}: accepted are a number of ranks from 1 on and gigabytes above 0")
    device, memory = "cpu" if options.cpu else "cuda", options.gpu_memory * GB
    where = [f"model.path={options.model}", f"model.device={device}"]
    config = load_config(options.recipe, [*options.overrides, *where])
    shape = plan.shape(options.model)
    if not config.train.tokens_per_microbatch:
        config = with_tokens(config, tokens_that_fit(config, shape, options.ranks, int(memory)))
    made = plan.make_plan(config, shape, ranks=options.ranks, memory=int(memory), device=device)
    fits = made.peak <= memory
    change = [] if fits else plan.advice(config, shape, options.ranks, int(memory), device)
    seconds = expected_seconds(config, made.parameters, device)
    if options.json:
        sizes = {kind: getattr(made, kind) for kind in KINDS}
        totals = {"update": made.update, "rollout": made.rollout, "pool_tokens": made.pool_tokens}
        totals["tokens_per_microbatch"] = config.train.tokens_per_microbatch
        print(json.dumps({**sizes, **totals, "fits": fits, "change": change, "seconds": seconds}))
    else:
        print(f"micro-batches of {config.train.tokens_per_microbatch:,} tokens")
        show(made, options.model, options.ranks, options.gpu_memory, change, seconds)
    return 0 if fits else 1


def show(made: Plan, name: str, ranks: int, memory: float, change: list[str], seconds: str) -> None:
    table = Table(box=None, title=f"{name}, each of {ranks} ranks of {memory:g} GB")
    table.add_column("kind")
    table.add_column("GB", justify="right")
    for kind, words in KINDS.items():
        table.add_row(words, f"{getattr(made, kind) / GB:,.2f}")
    table.add_row("peak of an update", f"{made.update / GB:,.2f}")
    table.add_row("peak of a rollout", f"{made.rollout / GB:,.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"the pool holds {made.pool_tokens:,} tokens")
    console.print("it does not fit; what would: " + " or ".join(change) if change else "it fits")
    console.print(seconds)


def expected_seconds(config: Config, parameters: int, device: str, results: Path = RESULTS) -> str:
    """What a step's sampling takes at most, by the row of a model of this size; what is said without one."""
    rows: list[dict[str, Any]] = []
    if results.is_file():
        with results.open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
    g, d = config.grpo, config.dialogue
    tokens = g.group_size * g.groups_per_step * 2 * d.max_rounds * d.max_tokens_per_turn
    kinds = {"cpu": ("EPYC", "Xeon"), "cuda": ("NVIDIA", "H100", "H200")}[device]
    rows = [
        row
        for row in rows
        if 0.8 < _size(row["model"]) / parameters < 1.25
        and row["dtype"] == config.model.dtype
        and any(kind in row["device"] for kind in kinds)
    ]
    if not rows:
        what = f"this size in {config.model.dtype} on {device}"
        return f"seconds per step: no row of bench/results measures {what}"
    row = max(rows, key=lambda row: (int(row["batch"]), row["date"]))
    seconds = tokens / float(row["ours_tokens_per_s"])
    where = f"rollout.csv: {row['model']}, batch {row['batch']}, {row['device']}, {row['date']}"
    return f"seconds per step: {seconds:.1f} of sampling at most ({where}); no row for the update"


def _size(name: str) -> float:
    """Parameters by a name as "4.2M"; 0 for others."""
    number, unit = name[:-1], {"M": 1e6, "B": 1e9}.get(name[-1:], 0)
    return float(number) * unit if number.replace(".", "", 1).isdigit() else 0.0
