"""The table of README: `duologue plan` of well-known shapes on 1, 4 and 8 devices of 141 GB."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.config import load_config
from duologue.grpo.plan import GB, make_plan, shape

MODELS = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
SETTINGS = [
    "model.device=cuda",
    "model.dtype=bfloat16",
    "rollout.cache_tokens=0",
    "train.tokens_per_microbatch=8192",
]
MEMORY = 141 * GB


def cell(model: str, rank: int, ranks: int) -> str:
    settings = [*SETTINGS, f"model.path={model}", f"lora.rank={rank}"]
    config = load_config("collective-agency", settings)
    plan = make_plan(config, shape(model), ranks=ranks, memory=MEMORY, device="cuda")
    if plan.peak <= MEMORY:
        return f"{plan.update / GB:.0f} GB, {plan.pool_tokens // 1000}k"
    return f"no: {plan.update / GB:.0f} GB"


def table() -> str:
    """An adapter takes the same of every rank, so it has one column."""
    lines = ["| | all weights, 1 device | 4 | 8 | LoRA 16, each |", "|---|---|---|---|---|"]
    for model in MODELS:
        cells = [cell(model, 0, ranks) for ranks in (1, 4, 8)]
        adapters = {cell(model, 16, ranks) for ranks in (1, 4, 8)}
        lines.append(f"| {model} | {' | '.join([*cells, ' / '.join(sorted(adapters))])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
