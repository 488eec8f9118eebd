"""With `train.shares` a run has the same bits for any number of ranks, and goes on with another number."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.build import build_optimizer
from duologue.grpo.config import load_config
from duologue.grpo.packing import Row
from duologue.grpo.run_dir import read_lines
from duologue.grpo.shares import dealt, micro_batches, share_numbers
from duologue.grpo.world import World
from safetensors.torch import load_file
from thread_ranks import Meeting, Rank, on_ranks, train_on_ranks
from tiny import LETTERS, MODEL, VOLATILE, decoder

SETTINGS = [
    *LETTERS,
    "train.shares=4",
    "train.threads=1",
    "train.save_every=1",
    "train.kl_every=1",
    "train.tokens_per_microbatch=150",  # more than one round
    "grpo.group_size=4",
    "grpo.groups_per_step=5",
    "grpo.advantage=running",
    "grpo.learning_rate=1e-3",
    "dialogue.max_tokens_per_turn=10",
    "eval.dialogues=2",
    "eval.partners=[]",
]


def run(path: Path, ranks: int, steps: int, *more: str) -> None:
    """A run, from its start or from where it is."""
    config = load_config("text-game", [*SETTINGS, f"train.steps={steps}", *more])

    train_on_ranks(config, path, ranks)


def outcome(path: Path) -> tuple[Any, ...]:
    metrics = read_lines(path / "metrics.jsonl")
    metrics = [{k: v for k, v in row.items() if k not in {*VOLATILE, "idle_share"}} for row in metrics]
    dialogues = [d for d in read_lines(path / "dialogues.jsonl") if d["stage"] == "selfplay"]
    return metrics, dialogues


def tensors(path: Path, step: int) -> dict[str, torch.Tensor]:
    folder = path / "checkpoints" / f"step_{step:06d}"
    return {**load_file(folder / "model.safetensors"), **torch.load(folder / "optimizer.pt")}


FUSED = ("model.dtype=bfloat16", "train.gradient_accumulation_fusion=true")


@pytest.mark.parametrize("more", [(), FUSED])
def test_a_run_has_the_same_bits_for_any_number_of_ranks(more: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path / "1", 1, 3, *more)
    run(tmp_path / "4", 4, 2, "train.recompute=layer", *more)  # which changes nothing
    run(tmp_path / "4", 2, 3, *more)
    whole, parts = outcome(tmp_path / "1"), outcome(tmp_path / "4")
    assert whole == parts
    assert all(row["grad_norm"] > 0 for row in whole[0])
    a, b = (tensors(tmp_path / name, 3) for name in ("1", "4"))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def rows(n: int) -> list[Row]:
    draws = random.Random(n)
    lengths = [draws.randint(2, 40) for _ in range(n)]
    return [
        Row(
            token_ids=[1] * length,
            loss_mask=[False] + [True] * (length - 1),
            logprobs=[0.0] * length,
            advantage=1.0,
            dialogue_id=i,
            role=0,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("shares", [0, 4, 12])
@pytest.mark.parametrize("n", [0, 3, 50])
def test_every_row_is_in_one_micro_batch_and_all_ranks_have_as_many(n: int, shares: int) -> None:
    given = rows(n)

    def work(rank: Rank) -> list[list[int]]:
        parts = micro_batches(dealt(given, rank, shares), 60, rank, shares)
        return [[row.dialogue_id for row in part] for part in parts]

    by_size = {size: on_ranks(size, work) for size in (1, 2, 4)}
    for of_ranks in by_size.values():
        assert len({len(parts) for parts in of_ranks}) == 1
        assert sorted(i for parts in of_ranks for part in parts for i in part) == [*range(n)]
    if shares:  # and in the order of rounds they are the same
        in_turn = [
            [part for of_round in zip(*of_ranks, strict=True) for part in of_round]
            for of_ranks in by_size.values()
        ]
        assert in_turn[0] == in_turn[1] == in_turn[2]


def test_shares_are_of_about_the_same_size() -> None:
    sizes = [len(row.token_ids) for row in rows(200)]
    loads = [0] * 8
    for size, number in zip(sizes, share_numbers(sizes, 8), strict=True):
        loads[number] += size
    assert max(loads) - min(loads) <= max(sizes)


def test_shares_that_ranks_cannot_have_evenly_are_refused() -> None:
    config = load_config("deal", [*MODEL, "train.shares=3"])
    with pytest.raises(ValueError, match=r"train.shares = 3: accepted is 0 or a multiple of the 2 ranks"):
        build_optimizer(config, decoder(), Rank(Meeting(2), 0))
    config = load_config("deal", [*MODEL, "train.offload_moments=true"])
    with pytest.raises(ValueError, match=r"train.offload_moments = true: accepted is false on cpu"):
        build_optimizer(config, decoder(), World())
