"""Plays a fixed set of cases and digests all that comes of them, bit for bit.

`test_golden.py` compares with `golden/digests.json`. A change of structure must leave every digest as it is.
Whoever moves or renames something adapts the first section, the calls into duologue, and never what is
recorded below it.

    python tests/golden_cases.py --compare tests/golden/digests.json    # prints what differs
    python tests/golden_cases.py --write FILE                           # records anew
    python tests/golden_cases.py --write-run DIR                        # a run that was stopped in self-play

Bits belong to an instruction set, so `SETTING` is put into the environment unless it says otherwise already.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.cli import main as duologue_command
from duologue.grpo.config import GrpoSection, load_config
from duologue.grpo.console import Progress
from duologue.grpo.imitation import accumulate_imitation_gradient, demonstration_batch
from duologue.grpo.kl import kl_to_reference
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import Interrupted, RunDir, read_lines
from duologue.grpo.trainer import train
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import backend
from duologue.model.checkpoint import save_model
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams
from duologue.rollout.games.catalogue import GAMES, corpus
from duologue.rollout.judge.asking import Ask
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.questions import REQUIRED, load_prompt
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import Dialogue, Group, View, assign_rewards
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import Opponent
from safetensors.torch import load_file

# The kernels, torch's own loops, and MKL, which computes an `exp` of many.
SETTING = {"DUOLOGUE_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}
GOLDEN = Path(__file__).resolve().parent / "golden"
Plain = dict[str, Any]
# For each group: the guest's side, and "engine" or "adapter"; None: no guest.
Sides = Sequence[tuple[int, str] | None]


# ============================================================================================================
# Calls into duologue. Adapt these when something moves; what goes in and comes out stays as it is.
# ============================================================================================================


def use_threads(n: int) -> None:
    backend.lib().set_threads(n)
    torch.set_num_threads(n)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_dir(folder)


def make_model(vocab_size: int, **shape: Any) -> Decoder:
    """A decoder with weights from seed 0."""
    model = Decoder(ModelConfig(vocab_size=vocab_size, **shape))
    model.init_weights(0)
    return model


def with_adapter(model: Decoder, seed: int, spread: float, dropout: float = 0.0) -> LoraDecoder:
    """An adapter on `model` that changes something."""
    settings = LoraSettings(rank=4, alpha=8.0, dropout=dropout)
    policy = LoraDecoder(model, new_adapter(model, settings, seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in policy.adapter.pairs.values():
            b.copy_(spread * torch.randn(b.shape, generator=generator))
    return policy


class Session:
    """An engine on `model`: branches live in it, and it plays many requests at once.

    A branch can `append(ids)`, `fork(n)`, `rewind(n)` and `close()`.
    """

    def __init__(
        self, model: Decoder, others: Sequence[LoraDecoder | None] = (), version: int = 0, **options: Any
    ) -> None:
        """`others` are adapters 1, 2 and so on of branches, None the base."""
        self.engine = Engine(model, **options)
        if others:
            self.engine.use_adapters([None if other is None else other.adapter for other in others])
        if version:
            self.engine.name_weights(version)

    def open(self, ids: list[int], adapter: int = 0) -> Branch:
        return self.engine.open(ids, adapter)

    def prefill(self, branches: list[Branch]) -> None:
        self.engine.prefill(branches)

    def play(self, work: Sequence[tuple[Branch, Plain]]) -> list[Plain]:
        """All of (branch, sampling parameters) at once."""
        requests = [self.engine.start(branch, SamplingParams(**params)) for branch, params in work]
        self.engine.run()
        return [completion_record(request.completion) for request in requests]

    def generate(self, prompts: list[list[int]], params: list[Plain], n: int = 1) -> list[Plain]:
        return [
            completion_record(c)
            for c in self.engine.generate(prompts, [SamplingParams(**p) for p in params], n)
        ]

    def stats(self) -> Plain:
        """All counters but those that count seconds."""
        return {
            key: value for key, value in dataclasses.asdict(self.engine.stats).items() if "seconds" not in key
        }

    def free_pages(self) -> list[int]:
        return [self.engine.pool.n_free, self.engine.pool.n_pages]


def completion_record(c: Completion) -> Plain:
    return {
        "ids": c.token_ids,
        "logprobs": c.logprobs,
        "entropies": c.entropies,
        "kept_sizes": c.supports.sizes,
        "kept_ids": c.supports.ids,
        "finish": c.finish_reason,
        "error": c.error,
        "weights_version": c.weights_version,
    }


def play_negotiations(
    game: str,
    session: Session,
    tokenizer: Tokenizer,
    other: Session | None,
    *,
    rules: Plain,
    sides: Sides,
    size: int,
    seed: int,
    split: str,
) -> list[Group]:
    """One group of `size` dialogues for each of `sides`, with their rewards; all is drawn by `seed`."""
    played = GAMES[game]()
    arena = Arena(session.engine, tokenizer, played, Rules(**rules))
    rng = random.Random(seed)
    scenarios = [played.sample(rng, split) for _ in sides]
    opponents, step = _opponents(session, other, sides), session.engine.weights_version
    groups = arena.play(scenarios, group_size=size, seed=seed, opponents=opponents, step=step)
    assign_rewards(played, [d for group in groups for d in group.dialogues])
    return groups


def play_deliberations(
    session: Session,
    tokenizer: Tokenizer,
    other: Session | None,
    *,
    folder: Path,
    alone: bool,
    rules: Plain,
    sides: Sides,
    size: int,
    seed: int,
    split: str,
    judge: Callable[[str, str], Plain | None],
    delay: int,
) -> tuple[list[Group], list[tuple[str, str]]]:
    """The same on the dilemmas in `folder`, and (kind, text) of all that was asked of `judge`.

    It answers `delay` looks later.
    """
    files = {key: str(folder / f"{key}.jsonl") for key in ("dilemmas", "personas", "tasks")}
    kind = GAMES["dilemma_alone" if alone else "dilemma"]
    game = kind(kind.Settings(**files))
    backend = _Backend(judge, delay)
    prompts = {kind: load_prompt(kind) for kind in REQUIRED}
    with tempfile.TemporaryDirectory() as temporary:
        asked = FeedbackJudge(
            backend, Ledger(Path(temporary) / "ledger.sqlite"), prompts, max_unscored_share=0.99
        )
        arena = Arena(session.engine, tokenizer, game, Rules(**rules), asked)
        rng = random.Random(seed)
        scenarios = [game.sample(rng, split) for _ in sides]
        groups = arena.play(
            scenarios, group_size=size, seed=seed, opponents=_opponents(session, other, sides)
        )
        assign_rewards(game, [d for group in groups for d in group.dialogues])
        asked.close()
    return groups, backend.asked


def _opponents(session: Session, other: Session | None, sides: Sides) -> list[Opponent | None]:
    """On the other session's engine, or adapter 1 or 2 of this one's, by its side."""
    found: list[Opponent | None] = []
    for side in sides:
        if side is None:
            found.append(None)
        elif side[1] == "adapter":
            found.append(Opponent(role=side[0], name="beside", engine=session.engine, adapter=1 + side[0]))
        else:
            assert other is not None
            found.append(Opponent(role=side[0], name="other", engine=other.engine))
    return found


class _Backend:
    """Answers in this thread, some looks after it was asked."""

    settings: dict[str, object] = {}  # noqa: RUF012
    name = "golden"

    def __init__(self, judge: Callable[[str, str], Plain | None], delay: int) -> None:
        self.judge, self.delay = judge, delay
        self.asked: list[tuple[str, str]] = []
        self.waiting: list[tuple[int, Ask]] = []

    def ask(self, question: Ask) -> None:
        self.asked.append((question.kind, question.text))
        self.waiting.append((self.delay, question))

    def work(self) -> bool:
        due = [question for left, question in self.waiting if left == 0]
        self.waiting = [(left - 1, question) for left, question in self.waiting if left]
        for question in due:
            given = self.judge(question.kind, question.text)
            text = None if given is None else json.dumps(given)
            if text is not None:
                question.check(text)
            question.done(text, "no answer")
        return True

    def close(self) -> None:
        return


def dialogue_record(d: Dialogue) -> Plain:
    o = d.outcome
    return {
        "scenario": [
            d.scenario.game,
            d.scenario.id,
            d.scenario.split,
            *d.scenario.private_text,
            d.scenario.shared_text,
        ],
        "personas": [[p.name, p.instructions] for p in d.scenario.personas],
        "first_speaker": d.first_speaker,
        "players": d.players,
        "weights_version": d.weights_version,
        "reward": d.reward,
        "outcome": o
        and {
            "agreed": o.agreed,
            "scores": o.scores,
            "failure": o.failure,
            "metrics": o.metrics,
            "rounds": o.rounds,
        },
        "turns": [
            {"role": t.role, "kind": t.kind, "text": t.text, "ids": t.token_ids, "logprobs": t.logprobs}
            for t in d.turns
        ],
        "views": [_view_record(role, view) for role, view in zip(d.view_roles, d.views, strict=True)],
    }


def _view_record(role: int, view: View) -> Plain:
    return {
        "role": role,
        "ids": view.token_ids,
        "kinds": view.kinds,
        "logprobs": view.logprobs,
        "kept_sizes": view.supports.sizes,
        "kept_ids": view.supports.ids,
    }


def new_optimizer(model: Decoder, **settings: Any) -> Optimizer:
    return Optimizer(model, **{"betas": (0.9, 0.95), "weight_decay": 0.01, "max_grad_norm": 1.0, **settings})


def policy_gradient(
    model: Decoder,
    optimizer: Optimizer,
    groups: list[Group],
    *,
    grpo: Plain,
    loss: Plain,
    temperature: float,
    max_tokens: int,
    reference: Decoder | None,
    budget: int,
    rewards: list[tuple[float, float]],
    baseline: dict[int, float],
) -> tuple[Plain, list[Plain]]:
    """Add the gradient of dialogues with these rewards; its statistics, and what became of each row."""
    dialogues = [d for group in groups for d in group.dialogues]
    for dialogue, reward in zip(dialogues, rewards, strict=True):
        dialogue.reward = reward
    means = RunningBaseline(means=dict(baseline))
    rows, row_stats = grpo_rows(groups, GrpoSection(**grpo), means)
    extra: Plain = {"baseline": {str(role): mean for role, mean in means.means.items()}}
    if reference is not None:
        extra["kl_to_reference"] = kl_to_reference(
            reference, rows, temperature=temperature, max_tokens=max_tokens
        )
    stats = accumulate_policy_gradient(
        model,
        rows,
        LossConfig(**loss),
        temperature=temperature,
        max_tokens=max_tokens,
        budget=budget,
        dropout_seed=11,
        reference=reference if loss.get("kl_coef") else None,
        after_part=optimizer.accumulate,
    )
    found = [
        {
            "ids": r.token_ids,
            "mask": r.loss_mask,
            "logprobs": r.logprobs,
            "advantage": r.advantage,
            "of": [r.dialogue_id, r.role],
            "kept_sizes": r.supports.sizes if r.supports else None,
            "kept_ids": r.supports.ids if r.supports else None,
        }
        for r in rows
    ]
    return {**stats.metrics(), **row_stats, **extra}, found


def imitation_gradient(
    model: Decoder, tokenizer: Tokenizer, game: str, *, n: int, seed: int, coefficient: float, max_tokens: int
) -> Plain:
    """Add the gradient of imitating `n` scripted dialogues; its statistics."""
    scripts = corpus(GAMES[game](), 40, seed)
    rows = demonstration_batch(scripts, tokenizer, n, seed)
    stats = accumulate_imitation_gradient(
        model, rows, max_tokens=max_tokens, coefficient=coefficient, dropout_seed=12
    )
    return stats.metrics()


def optimizer_step(optimizer: Optimizer, lr: float) -> float:
    """Apply the gradients; their norm."""
    return optimizer.step(lr)


def parameters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """All that is trained, by name."""
    return dict(optimizer.parameters)


def gradients(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """What the next step applies, before it is clipped."""
    optimizer.accumulate()
    return {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}


def optimizer_state(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}


def _words(text: str) -> list[str]:
    return text.split()


# The recipe as it was when the records were made.
RECORDED = _words("""
    opponent.kind=self game.objective=cooperative imitation.characters=[] imitation.final_weight=1
""")
TRAIN = RECORDED + _words("""
    model.hidden_size=32 model.intermediate_size=48 model.num_layers=2 model.num_heads=2
    model.num_kv_heads=1 model.head_dim=16 model.vocab_size=300 model.max_position=400 imitation.steps=3
    imitation.dialogues=100 imitation.dialogues_per_step=6 train.steps=3 train.save_every=2 train.kl_every=2
    train.tokens_per_microbatch=700 grpo.group_size=4 grpo.groups_per_step=2 grpo.imitation_coef=0.5
    grpo.advantage=std grpo.entropy_coef=0.01 dialogue.max_rounds=2 dialogue.max_tokens_per_turn=10
    dialogue.max_tokens_final=8 eval.dialogues=6 eval.partners=[] rollout.cache_tokens=4096
""")
# From a checkpoint that makes a deal now and then, so that rewards differ.
ONWARD = RECORDED + _words("""
    imitation.steps=0 train.steps=2 train.kl_every=0 train.tokens_per_microbatch=2000 grpo.group_size=8
    grpo.groups_per_step=5 grpo.advantage=mean dialogue.temperature=0.6 dialogue.max_rounds=4
    dialogue.max_tokens_per_turn=28 dialogue.max_tokens_final=12 eval.dialogues=2 eval.partners=[]
    rollout.cache_tokens=16384
""")
# As small as it can be, with all that a checkpoint keeps: moments, ratings, a running baseline.
STOPPED = RECORDED + _words("""
    model.hidden_size=8 model.intermediate_size=16 model.num_layers=1 model.num_heads=1 model.num_kv_heads=1
    model.head_dim=8 model.vocab_size=290 model.max_position=900 imitation.steps=2 imitation.dialogues=60
    imitation.dialogues_per_step=4 train.steps=4 train.save_every=2 train.keep_checkpoints=1
    train.kl_every=2 grpo.group_size=2 grpo.groups_per_step=2 grpo.imitation_coef=0.5 grpo.advantage=running
    dialogue.max_rounds=1 dialogue.max_tokens_per_turn=8 dialogue.max_tokens_final=8 dialogue.top_p=0.9
    eval.dialogues=2 rollout.cache_tokens=4096 opponent.kind=frozen train.threads=1 grpo.entropy_coef=0.01
    grpo.kl_coef=0.05 game.objective=selfish game.walk_away=2
""")


def save_checkpoint(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    save_model(model, tokenizer, folder)


def run_command(*words: str) -> None:
    """`duologue WORDS`, in this process, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = duologue_command([*words])
    assert code == 0, said.getvalue()


def stop_a_run(path: Path, settings: list[str], after: int) -> None:
    """A run of recipe `deal` that is asked to stop in its self-play step number `after`."""
    config, stop = load_config("deal", settings), threading.Event()

    class StopAfter(Progress):
        def update(self, step: int, metrics: Any) -> None:
            if metrics["stage"] == "selfplay" and step == after:
                stop.set()

    run = RunDir.create(path, config.to_toml())
    with contextlib.suppress(Interrupted):
        train(config, run, StopAfter(quiet=True), stop)
    run.close()
    (path / ".lock").unlink()


def run_record(path: Path) -> Plain:
    """What a finished run left behind."""
    last = max((path / "checkpoints").glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
    metrics = read_lines(path / "metrics.jsonl")
    later = {
        "agreement",
        "policy_points",
        "opponent_points",
    }  # what a row of payoffs has got since, beside its sums by partner
    for step in metrics:
        step.pop("partners", None)
        step.pop("instruction_set", None)  # of the machine, not of the run
    for row in (row for step in metrics for row in step.get("payoff", {}).values()):
        for key in later:
            row.pop(key, None)
    return {
        "metrics": metrics,
        "dialogues": read_lines(path / "dialogues.jsonl"),
        "weights": load_file(last / "model.safetensors"),
        "moments": torch.load(last / "optimizer.pt", weights_only=True),
        "state": json.loads((last / "trainer_state.json").read_text("utf-8")),
        "summary": json.loads((path / "summary.json").read_text("utf-8")),
        "checkpoints": sorted(p.name for p in (path / "checkpoints").iterdir()),
    }


# ============================================================================================================
# What is recorded. Not to be touched: every digest would lose its meaning.
# ============================================================================================================

EACH = 2  # characters of an item's own digest, which only have to tell where a field differs


@dataclasses.dataclass(slots=True)
class Case:
    """Items of one kind (dialogues, completions, parameters), fields of each, and plain values for people."""

    name: str
    kind: str
    items: list[Plain]
    plain: Plain


def canonical(value: Any) -> Any:
    """As JSON, with the exact bits of floats and tensors."""
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().cpu()
        return [str(raw.dtype), [*raw.shape], sha256(raw.reshape(-1).view(torch.uint8).numpy().tobytes())]
    if isinstance(value, dict):
        return {str(key): canonical(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple | array):
        return [canonical(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no canonical form")


def sha256(data: bytes) -> str:
    """In base64, which is shorter than hexadecimal digits."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def encoded(value: Any) -> bytes:
    return json.dumps(canonical(value), ensure_ascii=False, separators=(",", ":")).encode()


def digested(case: Case) -> Plain:
    """A case as it is stored."""
    fields: Plain = {}
    for field in case.items[0] if case.items else []:
        texts = [encoded(item[field]) for item in case.items]
        fields[field] = [sha256(b"\n".join(texts)), "".join(sha256(text)[:EACH] for text in texts)]
    return {"kind": case.kind, "items": len(case.items), "fields": fields, "plain": canonical(case.plain)}


def holds(was: Any, now: Any) -> bool:
    """Whether all that was recorded is there now; what is new may be."""
    if isinstance(was, dict) and isinstance(now, dict):
        return all(key in now and holds(value, now[key]) for key, value in was.items())
    return bool(was == now)


def differences(recorded: Plain, case: Case) -> list[str]:
    """One line for each item and field of a case that is not as it was recorded."""
    now = digested(case)
    found = []
    if recorded["items"] != now["items"]:
        found.append(
            f"{case.name}: {recorded['items']} {case.kind}s were recorded, now there are {now['items']}"
        )
    for field, was in recorded["fields"].items():
        if field not in now["fields"]:
            found.append(f"{case.name}: {field} is not there any more")
        elif now["fields"][field] != was:
            each, before = now["fields"][field][1], was[1]
            n = min(recorded["items"], now["items"])
            at = [i for i in range(n) if each[EACH * i : EACH * (i + 1)] != before[EACH * i : EACH * (i + 1)]]
            for i in at:
                name = f" ({case.items[i]['name']})" if "name" in case.items[i] else ""
                value = json.dumps(canonical(case.items[i][field]), ensure_ascii=False)
                found.append(f"{case.name}, {case.kind} {i}{name}: {field} differs; it is now {value[:160]}")
            if not at:
                found.append(
                    f"{case.name}: {field} differs, where short digests do not tell, or in how many there are"
                )
    for key, was in recorded["plain"].items():
        if not holds(was, now["plain"].get(key)):
            found.append(
                f"{case.name}: {key} was {str(was)[:200]}, is now {str(now['plain'].get(key))[:200]}"
            )
    return found


# ---- dialogues ---------------------------------------------------------------------------------------------


def dialogue_items(records: list[Plain]) -> list[Plain]:
    """Turns in order, but finals by side: who of two is asked first is nobody's business."""
    items = []
    for d in records:
        talk = [t for t in d["turns"] if t["kind"] != "final"]
        turns = [*talk, *sorted((t for t in d["turns"] if t["kind"] == "final"), key=lambda t: t["role"])]
        outcome = d["outcome"] or dict.fromkeys(("agreed", "scores", "failure", "metrics", "rounds"))
        items.append(
            {
                **{
                    key: d[key]
                    for key in (
                        "scenario",
                        "personas",
                        "first_speaker",
                        "players",
                        "weights_version",
                        "reward",
                    )
                },
                **{
                    f"outcome {key}": outcome[key]
                    for key in ("agreed", "scores", "failure", "metrics", "rounds")
                },
                "turn roles and kinds": [[t["role"], t["kind"]] for t in turns],
                "turn texts": [t["text"] for t in turns],
                "turn ids": [t["ids"] for t in turns],
                "turn log-probs": [t["logprobs"] for t in turns],
                "view roles": [v["role"] for v in d["views"]],
                "view ids": [v["ids"] for v in d["views"]],
                "view kinds": [v["kinds"] for v in d["views"]],
                "view log-probs": [v["logprobs"] for v in d["views"]],
                "view supports": [[v["kept_sizes"], v["kept_ids"]] for v in d["views"]],
            }
        )
    return items


def outcomes(records: list[Plain]) -> Plain:
    ends = Counter(
        "unscored" if d["outcome"] is None else d["outcome"]["failure"] or "agreed" for d in records
    )
    first = records[0]["turns"]
    return {
        "ends": dict(sorted(ends.items())),
        "turns": sum(len(d["turns"]) for d in records),
        "sampled tokens": sum(len(t["logprobs"] or ()) for d in records for t in d["turns"]),
        "first words": [t["text"][:80] for t in first if t["kind"] != "final"][:2],
        "first log-prob": next((t["logprobs"][0] for t in first if t["logprobs"]), None),
    }


def load_small_policy() -> tuple[Decoder, Tokenizer]:
    """A decoder that has imitated `deal` and `price` for a while.

    It is stored as integers and a power of two for each matrix.
    """
    tokenizer = load_tokenizer(GOLDEN / "policy")
    shape = {
        "model_type": "qwen3",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    model = make_model(400, **shape)
    stored = load_file(GOLDEN / "policy" / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name].float() * stored[f"{name}.scale"])
    return model, tokenizer


def changed(model: Decoder, factor: float) -> Decoder:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return other


NEGOTIATIONS: list[tuple[int, Plain, Plain, Sides, bool]] = [  # seed, rules, engine, guests, adapters
    (
        0,
        {"max_rounds": 4, "max_tokens_per_turn": 28, "max_tokens_final": 14},
        {},
        (None, (0, "engine"), (1, "engine"), None),
        False,
    ),
    (
        1,
        {"max_rounds": 2, "max_tokens_per_turn": 24, "max_tokens_final": 12, "first_speaker": "alternate"},
        {"decode_steps": 5, "version": 3},
        (None, (0, "adapter"), (1, "adapter"), (1, "engine")),
        True,
    ),
    (
        2,
        {
            "max_rounds": 5,
            "max_tokens_per_turn": 20,
            "max_tokens_final": 14,
            "first_speaker": "first",
            "temperature": 0.8,
            "final_temperature": 0.0,
        },
        {"cache_tokens": 2048, "max_batch": 7, "max_step_tokens": 96},
        ((0, "engine"), None, None, (0, "engine")),
        False,
    ),
]


def negotiations() -> Iterator[Case]:
    model, tokenizer = load_small_policy()
    second = changed(model, 1.05)
    for game in ("deal", "price"):
        for seed, rules, options, sides, adapters in NEGOTIATIONS:
            for truncated in (False, True):
                base = copy.deepcopy(model)
                policy = with_adapter(base, 1, 0.03) if adapters else base
                beside = [None, with_adapter(base, 2, 0.05)] if adapters else []
                more = {"top_p": 0.85, **({"final_top_p": 0.5} if seed == 1 else {})} if truncated else {}
                session = Session(policy, beside, **options)
                other = Session(second, version=options.get("version", 0))
                groups = play_negotiations(
                    game,
                    session,
                    tokenizer,
                    other,
                    rules={**rules, **more},
                    sides=sides,
                    size=4,
                    seed=seed,
                    split="heldout" if seed == 2 else "train",
                )
                records = [dialogue_record(d) for group in groups for d in group.dialogues]
                name = f"negotiations {game} seed {seed}{' truncated' if truncated else ''}"
                left = session.free_pages(), other.free_pages()
                yield Case(
                    name, "dialogue", dialogue_items(records), {**outcomes(records), "free pages": left}
                )


REWRITING = (  # thoughts stand before a reply and leave the history
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ '(think)' if m['role'] == 'assistant' and loop.last }}{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>(think)' }}{% endif %}"
)
PERSONAS = [
    {
        "id": "cost",
        "first": {"name": "Ada", "instructions": "spend little"},
        "second": {"name": "Bo", "instructions": "buy well"},
    },
    {
        "id": "time",
        "first": {"name": "Cy", "instructions": "be quick"},
        "second": {"name": "Di", "instructions": "be <sure>"},
    },
]
DILEMMAS = {
    "dilemmas": [
        {"id": "d1", "text": "who pays?"},
        {"id": "d2", "text": "is it right?"},
        {"id": "d3", "text": "2 hats or 1?"},
    ],
    "personas": PERSONAS,
    "tasks": [
        {**PERSONAS[0], "id": "t1", "text": "buy or not?"},
        {**PERSONAS[1], "id": "t2", "text": "go or stay?"},
    ],
}
TALK = {"max_rounds": 3, "max_tokens_per_turn": 10, "max_tokens_final": 12}
ENGINES: Sides = (None, (0, "engine"), (1, "engine"), None)
ADAPTERS: Sides = ((0, "adapter"), None, (1, "adapter"), (1, "adapter"))
NOBODY: Sides = (None,) * 4
DELIBERATIONS: list[tuple[str, Plain, Plain]] = [
    ("last_2", {"context": "last_2"}, {}),
    (
        "last_2 truncated",
        {"context": "last_2", "temperature": 0.7, "top_p": 0.9, "first_speaker": "alternate"},
        {"delay": 3},
    ),
    ("last_2 guests", {"context": "last_2", "top_p": 0.9}, {"sides": ENGINES}),
    ("last_2 adapters", {"context": "last_2", "first_speaker": "first"}, {"sides": ADAPTERS, "delay": 1}),
    (
        "last_2 rewriting template",
        {"context": "last_2", "temperature": 0.7, "top_p": 0.9},
        {"template": REWRITING},
    ),
    ("full", {"context": "full"}, {"delay": 2}),
    (
        "full truncated",
        {"context": "full", "temperature": 0.7, "top_p": 0.9, "first_speaker": "alternate"},
        {},
    ),
    ("full guests", {"context": "full", "top_p": 0.9, "final_temperature": 0.0}, {"sides": ENGINES}),
    ("full adapters", {"context": "full"}, {"sides": ADAPTERS}),
    (
        "always a final, last_2",
        {"context": "last_2", "always_final": True},
        {"split": "heldout", "stubborn": True},
    ),
    (
        "always a final, full",
        {"context": "full", "always_final": True, "final_top_p": 0.8},
        {"split": "heldout", "stubborn": True},
    ),
    ("alone", {"context": "last_2", "top_p": 0.9}, {"alone": True, "delay": 2}),
]


def verdict(kind: str, text: str) -> Plain | None:
    """A judge whose answers follow from the question alone: none to one in seven."""
    digest = hashlib.sha256(text.encode()).digest()
    if digest[0] % 7 == 0:
        return None
    if kind == "score":
        aspects = ("knowledge", "benevolence", "power", "vitality")
        return {
            **{aspect: byte % 6 for aspect, byte in zip(aspects, digest[1:], strict=False)},
            "reason": "known",
        }
    said = [re.findall(rf'<turn speaker="{n}">(.*?)</turn>', text, re.DOTALL) for n in (1, 2)]
    agreed = all(turns and turns[-1].split() for turns in said) and digest[1] % 3 == 0
    words = {
        str(n + 1): html.unescape(turns[-1]).split()[0] if agreed else "" for n, turns in enumerate(said)
    }
    return {"agreed": agreed, "assent": words}


def stubborn(kind: str, text: str) -> Plain | None:
    """The same, but nobody ever agrees in a dilemma of an even number of characters."""
    return {"agreed": False} if kind == "agreement" and len(text) % 2 else verdict(kind, text)


def deliberations() -> Iterator[Case]:
    shape = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 2000,
    }
    model = changed(make_model(400, **shape), 4.0)  # far from uniform, so that supports are small
    second = changed(model, 1.1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for key, rows in DILEMMAS.items():
            (folder / f"{key}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
        for i, (what, rules, how) in enumerate(DELIBERATIONS):
            words = Path(shutil.copytree(GOLDEN / "policy", folder / f"tokenizer{i}"))
            if "template" in how:
                (words / "chat_template.jinja").write_text(how["template"], "utf-8")
            tokenizer, base, sides = load_tokenizer(words), copy.deepcopy(model), how.get("sides", NOBODY)
            adapters = sides is ADAPTERS
            policy = with_adapter(base, 1, 0.1) if adapters else base
            session = Session(
                policy, [None, with_adapter(base, 2, 0.1)] if adapters else [], cache_tokens=32768
            )
            other = Session(second, cache_tokens=32768)
            groups, asked = play_deliberations(
                session,
                tokenizer,
                other,
                folder=folder,
                alone=how.get("alone", False),
                rules={**TALK, **rules},
                sides=sides,
                size=4,
                seed=20 + i,
                split=how.get("split", "train"),
                judge=stubborn if how.get("stubborn") else verdict,
                delay=how.get("delay", 0),
            )
            records = [dialogue_record(d) for group in groups for d in group.dialogues]
            questions = hashlib.sha256(
                "\n".join(sorted({f"{kind}\n{text}" for kind, text in asked})).encode()
            ).hexdigest()
            plain = {**outcomes(records), "questions": [len(set(asked)), questions]}
            plain["free pages"] = session.free_pages(), other.free_pages()
            yield Case(f"deliberations {what}", "dialogue", dialogue_items(records), plain)


# ---- the engine --------------------------------------------------------------------------------------------

VOCAB, N = 307, 32  # completions of a case


def engine_model(family: str = "qwen3", spread: float = 3.0) -> Decoder:
    shape = {
        "model_type": family,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "qkv_bias": family == "qwen2",
    }
    return changed(make_model(VOCAB, **shape), spread)


def prompts_of(seed: int, longest: int = 40) -> list[list[int]]:
    """Many begin alike."""
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB) for _ in range(longest)]
    return [
        [*stem[: rng.randint(0, longest)], *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9)))]
        for _ in range(N)
    ]


def sampling_of(seed: int, kind: str) -> list[Plain]:
    rng, found = random.Random(seed), []
    for i in range(N):
        params: Plain = {"max_new_tokens": rng.randint(1, 24), "seed": 100 * seed + i}
        if kind == "greedy":
            params |= {"temperature": 0.0, "stop_token_ids": tuple(rng.sample(range(VOCAB), 3))}
        if kind == "truncated":
            params |= rng.choice(
                [
                    {"top_p": 0.4},
                    {"top_k": 9},
                    {"min_p": 0.2},
                    {"top_p": 0.9, "top_k": 50},
                    {"temperature": 0.6},
                ]
            )
            params["stop_token_ids"] = tuple(rng.sample(range(VOCAB), rng.choice([0, 4, 16])))
        if kind == "mixed":
            params |= rng.choice([{}, {"temperature": 0.0}, {"top_p": 0.8}, {"temperature": 1.3}])
        if kind == "restricted":
            params["allow"] = (None, even_then_two, breaks_after_three, nothing_special)[i % 4]
        if kind == "stops":
            params |= {"max_new_tokens": 40, "stop_token_ids": tuple(rng.sample(range(VOCAB), 12))}
            params |= {"stop_strings": ("ab", "qz", "x")} if i % 2 else {}
        if kind == "unseeded":
            del params["seed"]
        found.append(params)
    return found


def even_then_two(ids: list[int]) -> list[int]:
    return list(range(0, VOCAB, 2)) if len(ids) % 2 else [7, 9, 11]


def breaks_after_three(ids: list[int]) -> list[int]:
    if len(ids) == 3:
        raise KeyError("no such state")
    return [5, 6]


def nothing_special(ids: list[int]) -> None:
    return None


def letters(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


ENGINE: list[tuple[str, str, Plain]] = [
    *((f"greedy, {n} ahead", "greedy", {"decode_steps": n}) for n in (1, 8, 33)),
    *((f"truncated, {n} ahead", "truncated", {"decode_steps": n}) for n in (1, 8, 33)),
    *((f"restricted, {n} ahead", "restricted", {"decode_steps": n}) for n in (1, 8)),
    ("stop ids and strings", "stops", {"decode_steps": 8, "decode": letters}),
    ("chunked prefill", "mixed", {"decode_steps": 8, "max_batch": 11, "max_step_tokens": 37}),
    *(
        (f"preemption, {n} ahead", "mixed", {"decode_steps": n, "cache_tokens": 176, "max_step_tokens": 64})
        for n in (1, 8, 33)
    ),
    ("no seeds, page of 32", "unseeded", {"seed": 5, "page_size": 32}),
]


def engine() -> Iterator[Case]:
    for number, (what, kind, options) in enumerate(ENGINE):
        session = Session(engine_model(), **options)
        found = session.generate(prompts_of(number), sampling_of(number, kind))
        yield engine_case(what, session, found)
    yield forks_and_rewinds()
    yield from mixed_adapters()
    session = Session(engine_model("qwen2").to(torch.bfloat16), max_batch=9)
    found = session.generate(prompts_of(40)[: N // 4], sampling_of(40, "mixed")[: N // 4], 4)
    yield engine_case("qwen2 in bfloat16, four of each", session, found)


def engine_case(what: str, session: Session, found: list[Plain]) -> Case:
    assert len(found) == N
    items = [
        {
            **{key: c[key] for key in ("ids", "logprobs", "entropies", "finish", "error", "weights_version")},
            "supports": [c["kept_sizes"], c["kept_ids"]],
        }
        for c in found
    ]
    ends = dict(sorted(Counter(c["finish"] for c in found).items()))
    plain = {
        "stats": session.stats(),
        "free pages": session.free_pages(),
        "ends": ends,
        "first ids": found[0]["ids"][:12],
        "tokens": sum(len(c["ids"]) for c in found),
    }
    return Case(f"engine {what}", "completion", items, plain)


def forks_and_rewinds() -> Case:
    """Turns of eight branches of one stem on a pool that evicts.

    They are rewound into pages that others hold too, and the weights change in between.
    """
    model, rng = engine_model(), random.Random(3)
    session = Session(model, cache_tokens=512, max_step_tokens=48, decode_steps=4)
    base = session.open([rng.randrange(VOCAB) for _ in range(37)])
    session.prefill([base])
    branches, found = [base, *base.fork(7)], []
    for turn in range(4):
        for branch in branches:
            branch.append([rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))])
        kinds: list[Plain] = [{}, {"top_p": 0.7}, {"temperature": 0.0}, {"top_k": 4}]
        work = [
            (b, {"max_new_tokens": 9, "seed": 10 * turn + i, **kinds[i % 4]}) for i, b in enumerate(branches)
        ]
        found += session.play(work)
        for i, branch in enumerate(branches):
            branch.rewind((i * 3 + turn) % 8)
        if turn == 1:
            branches[5].close()
            branches[5] = branches[2].fork(1)[0]
        if turn == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
    for branch in branches:
        branch.close()
    return engine_case("forks and rewinds", session, found)


def mixed_adapters() -> Iterator[Case]:
    for steps in (1, 8):
        base = engine_model()
        policy, other = with_adapter(base, 1, 0.2), with_adapter(base, 2, 0.2)
        session = Session(policy, [None, other], decode_steps=steps, cache_tokens=2048)
        prompts, params = prompts_of(30), sampling_of(30, "mixed")
        branches = [session.open(ids, i % 3 if i < N // 2 else 0) for i, ids in enumerate(prompts)]
        found = session.play([*zip(branches, params, strict=True)][: N // 2])
        found += session.play([*zip(branches, params, strict=True)][N // 2 :])
        for branch in branches:
            branch.close()
        yield engine_case(f"mixed adapters, {steps} ahead", session, found)


# ---- updates -----------------------------------------------------------------------------------------------

UPDATES: list[tuple[str, Plain, Plain, Plain]] = [  # name, grpo, loss, the rest
    (
        "dapo, truncated, imitation mixed in",
        {"advantage": "std"},
        {"variant": "dapo"},
        {"truncated": True, "coefficient": 0.5},
    ),
    (
        "dapo, mean, one part",
        {"advantage": "mean", "train_kinds": ("utterance",)},
        {"variant": "dapo"},
        {"max_tokens": 10**6},
    ),
    ("grpo", {"advantage": "leave_one_out", "train_roles": "first"}, {"variant": "grpo"}, {}),
    ("gspo", {"advantage": "std", "per_role": False}, {"variant": "gspo", "clip_low": 0.1}, {}),
    ("cispo, running", {"advantage": "running"}, {"variant": "cispo"}, {"truncated": True}),
    (
        "dr_grpo, dual clip, off-policy",
        {"advantage": "std"},
        {"variant": "dr_grpo", "dual_clip": 3.0},
        {"budget": 90, "moved": 1.03},
    ),
    (
        "dapo, KL and entropy",
        {"advantage": "std"},
        {"variant": "dapo", "kl_coef": 0.1, "entropy_coef": 0.02},
        {},
    ),
    (
        "grpo, k1, truncated",
        {"advantage": "std"},
        {"variant": "grpo", "kl_coef": 0.1, "kl_estimator": "k1"},
        {"truncated": True},
    ),
    (
        "dapo, adapter with dropout",
        {"advantage": "std"},
        {"variant": "dapo"},
        {"adapter": True, "coefficient": 0.5},
    ),
    ("dapo, bfloat16", {"advantage": "std"}, {"variant": "dapo"}, {"dtype": torch.bfloat16}),
]


def updates() -> Iterator[Case]:
    start, tokenizer = load_small_policy()
    played: dict[tuple[bool, bool, Any], list[Group]] = {}
    for what, grpo, loss, how in UPDATES:
        model = copy.deepcopy(start).to(how.get("dtype", torch.float32))
        if how.get("adapter"):
            model = with_adapter(model, 1, 0.03, dropout=0.1)
        key = how.get("truncated", False), how.get("adapter", False), how.get("dtype")
        if key not in played:
            rules = {
                "max_rounds": 3,
                "max_tokens_per_turn": 20,
                "max_tokens_final": 12,
                "top_p": 0.85 if key[0] else 1.0,
            }
            played[key] = play_negotiations(
                "deal",
                Session(model),
                tokenizer,
                None,
                rules=rules,
                sides=(None, None, None),
                size=4,
                seed=9,
                split="train",
            )
        groups = copy.deepcopy(played[key])
        model = changed(model, how.get("moved", 1.0))
        optimizer, limit = new_optimizer(model), how.get("max_tokens", 900)
        rewards = [(i % 3 / 2, 1.0 - i % 2 + i / 16) for i in range(12)]
        stats, rows = policy_gradient(
            model,
            optimizer,
            groups,
            grpo=grpo,
            loss=loss,
            temperature=1.0,
            max_tokens=limit,
            budget=how.get("budget", 0),
            reference=changed(start, 0.97) if loss.get("kl_coef") else None,
            rewards=rewards,
            baseline={0: 0.3, 1: 0.7},
        )
        if coefficient := how.get("coefficient"):
            stats["imitation"] = imitation_gradient(
                model, tokenizer, "deal", n=5, seed=3, coefficient=coefficient, max_tokens=limit
            )
        yield Case(
            f"update {what}, rows",
            "row",
            rows,
            {"rows": len(rows), "advantages": [row["advantage"] for row in rows][:4]},
        )
        yield stepped(f"update {what}", optimizer, stats)
    model = copy.deepcopy(start)
    optimizer = new_optimizer(model, max_grad_norm=0.0)
    stats = imitation_gradient(model, tokenizer, "price", n=9, seed=4, coefficient=1.0, max_tokens=700)
    yield stepped("update imitation", optimizer, stats)


def stepped(name: str, optimizer: Optimizer, stats: Plain) -> Case:
    """The gradient of every parameter, and its weights and moments after one step."""
    grads = gradients(optimizer)
    norm = optimizer_step(optimizer, 1e-3)
    state = optimizer_state(optimizer)
    items = [
        {
            "name": key,
            "gradient": grads.get(key),
            "weights": parameter,
            "state": {part: tensor for part, tensor in state.items() if part.split(".", 1)[1] == key},
        }
        for key, parameter in parameters(optimizer).items()
    ]
    largest = {key: float(grads[key].abs().max()) for key in sorted(grads)[:2]}
    return Case(name, "parameter", items, {"stats": stats, "gradient norm": norm, "largest": largest})


# ---- runs --------------------------------------------------------------------------------------------------

ONWARD_SEED = 6  # its first step has an agreement
CLOCKS = ("seconds", "memory", "per_s")  # in the names of measures that no two runs share


def runs(threads: int) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        run_command("train", "deal", *TRAIN, f"train.threads={threads}", "--run-dir", str(path))
        yield from run_cases("train", run_record(path))
        save_checkpoint(*load_small_policy(), Path(temporary) / "policy")
        start = [
            f"model.path={temporary}/policy",
            "game.telling=plain",
            "eval.ability=false",
            *ONWARD,
            f"train.threads={threads}",
            f"train.seed={ONWARD_SEED}",
        ]
        run_command("train", "deal", *start, "--run-dir", str(Path(temporary) / "onward"))
        yield from run_cases("train onward", run_record(Path(temporary) / "onward"))


def resumed() -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(shutil.copytree(GOLDEN / "run", Path(temporary) / "run"))
        more = ["--run-dir", str(path), "--resume", "eval.partners=[]"]
        run_command("train", str(path / "config.toml"), *more)
        yield from run_cases("resume", run_record(path))


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not any(word in key for word in CLOCKS)}
    return value


def run_cases(name: str, record: Plain) -> Iterator[Case]:
    rows = [timeless(row) for row in record["metrics"]]
    keys = sorted({key for row in rows for key in row})
    metrics = [{"name": f"step {row['step']}", **{key: row.get(key) for key in keys}} for row in rows]
    losses = [row.get("loss") for row in record["metrics"]]
    yield Case(
        f"{name} metrics.jsonl",
        "line",
        metrics,
        {"loss": losses, "reward": record["metrics"][-1].get("reward")},
    )
    lines = []
    for d in record["dialogues"]:
        talk = [t for t in d["turns"] if t["kind"] != "final"]
        finals = sorted((t for t in d["turns"] if t["kind"] == "final"), key=lambda t: t["role"])
        lines.append(
            {
                **{
                    key: d.get(key)
                    for key in (
                        "step",
                        "stage",
                        "policy",
                        "scenario",
                        "personas",
                        "outcome",
                        "reward",
                        "advantage",
                        "weights_version",
                        "players",
                    )
                },
                "turns": [*talk, *finals],
            }
        )
    yield Case(
        f"{name} dialogues.jsonl", "line", lines, {"first words": [t["text"] for t in lines[0]["turns"]][:2]}
    )
    moments = record["moments"]
    weights = [
        {
            "name": key,
            "weights": tensor,
            "moments": {k: v for k, v in moments.items() if k.split(".", 1)[1] == key},
        }
        for key, tensor in sorted(record["weights"].items())
    ]
    assert any(item["moments"] for item in weights)
    plain = {key: timeless(record[key]) for key in ("state", "summary", "checkpoints")}
    sums = {item["name"]: math.fsum(item["weights"].double().flatten().tolist()) for item in weights[:2]}
    yield Case(f"{name} weights", "parameter", weights, {**plain, "sums": sums})


# ---- the whole ---------------------------------------------------------------------------------------------


def all_cases(threads: int) -> Iterator[Case]:
    yield from negotiations()
    yield from deliberations()
    yield from engine()
    yield from updates()
    yield from runs(threads)
    yield from resumed()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="record there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print what differs from this recording")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --compare: the differences of every case"
    )
    parser.add_argument(
        "--write-run", type=Path, metavar="DIR", help="leave a run there that was stopped in self-play"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if missing := {
        key: value for key, value in SETTING.items() if key not in os.environ
    }:  # libraries read it as they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    use_threads(options.threads)
    if options.write_run:
        stop_a_run(options.write_run, STOPPED, after=2)
        return 0
    cases = list(all_cases(options.threads))
    if options.write:
        stored = {case.name: digested(case) for case in cases}
        lines = [
            f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
            for name, value in stored.items()
        ]
        options.write.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    if not options.compare:
        return 0
    recorded = json.loads(options.compare.read_text("utf-8"))
    found = {name: [f"{name}: this case was not played"] for name in recorded}
    for case in cases:
        found[case.name] = (
            differences(recorded[case.name], case)
            if case.name in recorded
            else [f"{case.name}: not recorded"]
        )
    if options.json:
        options.json.write_text(json.dumps(found), "utf-8")
    for line in (line for lines in found.values() for line in lines):
        print(line)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
