"""Tiny models, and settings of tiny runs, that tests share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from duologue.grpo.config import Config, load_config
from duologue.grpo.console import Progress
from duologue.grpo.packing import Row
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.trainer import Trainer, train
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer

MODEL = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.vocab_size=300",
    "model.max_position=400",
    "rollout.cache_tokens=4096",
]
LETTERS = [  # of the recipe text-game, where a policy from nothing earns something
    *MODEL,
    f"game.name={Path(__file__).parent.parent / 'bench' / 'letters.py'}",
    "model.num_layers=1",
]
ALONE = [  # of the recipe deal: the policy with itself, after the game's own mixture of scripts
    "opponent.kind=self",
    "game.objective=cooperative",
    "imitation.characters=[]",
    "imitation.final_weight=1",
]
TINY = [  # of a command that only has to run
    *MODEL,
    "model.num_layers=1",
    "imitation.steps=2",
    "imitation.dialogues=50",
    "imitation.dialogues_per_step=4",
    "train.steps=2",
    "train.save_every=1",
    "grpo.group_size=2",
    "grpo.groups_per_step=2",
    "dialogue.max_rounds=2",
    "dialogue.max_tokens_per_turn=8",
    "dialogue.max_tokens_final=6",
    "eval.dialogues=4",
    "eval.partners=[]",
    "eval.ability=false",
]
TINY_DEAL = [*TINY, *ALONE]
RUN = [  # of a run of eight steps, with all that a run can have
    *MODEL,
    *ALONE,
    "model.num_layers=2",
    "imitation.steps=4",
    "imitation.dialogues=200",
    "imitation.dialogues_per_step=6",
    "train.steps=4",
    "train.save_every=1",
    "train.kl_every=2",
    "train.tokens_per_microbatch=700",
    "grpo.group_size=4",
    "grpo.groups_per_step=2",
    "grpo.imitation_coef=0.5",
    "dialogue.max_rounds=2",
    "dialogue.max_tokens_per_turn=10",
    "dialogue.max_tokens_final=8",
    "eval.dialogues=8",
    "eval.partners=[]",
    "eval.ability=false",
]
VOLATILE = {"seconds", "peak_memory_bytes", "rollout_tokens_per_s", "update_tokens_per_s"}


def policy_rows(lengths: Sequence[int]) -> list[Row]:
    """Rows of these many tokens, trained from the fifth on, with advantages of either sign."""
    return [
        Row(
            token_ids=[(7 * i + k * k) % 40 for k in range(n)],
            loss_mask=[k > 3 for k in range(n)],
            logprobs=[-3.5] * n,
            advantage=(-1.0) ** i * (1 + i),
            dialogue_id=i,
            role=0,
        )
        for i, n in enumerate(lengths)
    ]


def model_config(**shape: Any) -> ModelConfig:
    """Of a Qwen3; `shape` is what differs."""
    tiny = {
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**tiny, **shape})


def decoder(seed: int = 0, **shape: Any) -> Decoder:
    """With weights from `seed`."""
    model = Decoder(model_config(**shape))
    model.init_weights(seed)
    return model


def all_text(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    """With the special tokens, which `Tokenizer.decode` leaves out."""
    text: str = tokenizer._core.decode(list(token_ids), skip_special_tokens=False)
    return text


def run_whole(path: Path, *more: str) -> dict[str, Any]:
    """A run of the deal recipe to its end, tiny but for `more`; its summary."""
    config = load_config("deal", [*RUN, *more])
    return train(config, RunDir.create(path, config.to_toml()), Progress(quiet=True), threading.Event())


def lines(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_lines(path / "metrics.jsonl")]


def trained(path: Path, config: Config, keep_all: bool = False) -> Trainer:
    """A whole run, and its trainer; with `keep_all` every snapshot of an opponent stays."""
    trainer = Trainer(config, RunDir.create(path, config.to_toml()), Progress(quiet=True), threading.Event())
    if keep_all:
        trainer.opponents.forget_before = lambda step: None  # type: ignore[method-assign]
    trainer.run()
    return trainer


def selfplay(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run's self-play."""
    return [row for row in read_lines(path / "metrics.jsonl") if row["stage"] == "selfplay"]


def dialogues(path: Path) -> list[dict[str, Any]]:
    """Those of a run's self-play."""
    return [d for d in read_lines(path / "dialogues.jsonl") if d["stage"] == "selfplay"]


def dying(n_lines: int) -> list[str]:
    """Begins a command of duologue that kills itself when it has written so many lines of metrics, with the
    next step computed and its dialogues written.
    """
    code = f"""
import os, signal, sys
from duologue.grpo.cli import main
from duologue.grpo.run_dir import RunDir, read_lines
write = RunDir.append_metrics
def append(run, row):
    if len(read_lines(run.path / "metrics.jsonl")) >= {n_lines}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(run, row)
RunDir.append_metrics = append
sys.exit(main(sys.argv[1:]))
"""
    return [sys.executable, "-c", code]
