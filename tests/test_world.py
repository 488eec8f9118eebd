"""Two ranks, each with half of the groups, have together what one process has: gradients, advantages,
metrics."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo import imitation, update
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import load_config
from duologue.grpo.console import Progress
from duologue.grpo.imitation import accumulate_imitation_gradient
from duologue.grpo.kl import kl_to_reference
from duologue.grpo.loss import VARIANTS, LossConfig
from duologue.grpo.opponents import payoff_table
from duologue.grpo.packing import Row
from duologue.grpo.rows import grpo_rows
from duologue.grpo.run_dir import Interrupted, RunDir
from duologue.grpo.sections import GrpoSection
from duologue.grpo.trainer import Trainer
from duologue.grpo.update import accumulate_policy_gradient
from duologue.grpo.world import ALONE, World
from duologue.kernels.advantage import METHODS
from duologue.rollout.games.game import Outcome, Scenario
from duologue.rollout.selfplay.dialogue import POLICY, Dialogue, Group, Turn, View
from tiny import RUN, decoder
from torch import Tensor

SIZE = 2


class Rank(World):
    """One of two, in a thread of its own; it meets the other at a barrier."""

    size = SIZE

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[Any]) -> None:
        self.rank, self.barrier, self.said = rank, barrier, said

    def exchange(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.barrier.wait(timeout=60)
        values = list(self.said)
        self.barrier.wait(timeout=60)
        return values

    each = exchange

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self.rank * len(items) // SIZE : (self.rank + 1) * len(items) // SIZE]

    def gather(self, items: Sequence[Any]) -> Sequence[Any]:
        return [item for part in self.exchange(items) for item in part]

    def sum(self, numbers: Sequence[float]) -> Sequence[float]:
        return [sum(column) for column in zip(*self.exchange(numbers), strict=True)]

    def most(self, number: float) -> float:
        return float(max(self.exchange(number)))

    def agree(self, flag: bool) -> bool:
        return any(self.exchange(flag))


def ranks() -> list[Rank]:
    barrier, said = threading.Barrier(SIZE), [None] * SIZE
    return [Rank(i, barrier, said) for i in range(SIZE)]


def together(work: Callable[[Rank], Any]) -> list[Any]:
    """What `work` returns on each rank."""
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(work, ranks()))


def make_rows(seed: int, n: int = 10) -> list[Row]:
    """Rows of several lengths, some with nothing to train, some with advantage 0, two with a long
    prefix in common."""
    rng = random.Random(seed)
    prefix = [rng.randrange(40) for _ in range(9)]
    rows = []
    for i in range(n):
        length = rng.randint(1, 9)
        mask = [False] * len(prefix) + [i != 3 and rng.random() < 0.7 for _ in range(length)]
        rows.append(
            Row(
                token_ids=prefix + [rng.randrange(40) for _ in range(length)],
                loss_mask=mask,
                logprobs=[-3.7 + rng.random() / 5 if trained else 0.0 for trained in mask],
                advantage=0.0 if i == 1 else rng.gauss(0, 1),
                dialogue_id=i,
                role=0,
            )
        )
    return rows


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def assert_parts_add_up(whole: list[Tensor], parts: list[list[Tensor]]) -> None:
    for expected, *of_ranks in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(of_ranks), expected, rtol=1e-4, atol=1e-7)


def test_alone_every_method_returns_its_argument() -> None:
    items, numbers = [1, 2, 3], [1.5, 2.0]
    assert ALONE.is_first
    assert (ALONE.rank, ALONE.size) == (0, 1)
    assert ALONE.share(items) is ALONE.gather(items) is items
    assert ALONE.sum(numbers) is numbers
    assert ALONE.most(2.5) == 2.5
    assert [ALONE.agree(flag) for flag in (True, False)] == [True, False]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_ranks_add_up_to_that_of_all_rows(variant: str, seed: int) -> None:
    config = LossConfig(
        variant=variant, entropy_coef=0.01 if seed else 0.0, kl_coef=0.1 if seed == 2 else 0.0
    )
    model, reference, rows = decoder(seed), decoder(seed + 7), make_rows(seed)
    options: dict[str, Any] = {"temperature": 0.9, "max_tokens": 40, "reference": reference}

    def part(world: Rank) -> tuple[list[Tensor], dict[str, float]]:
        mine = copy.deepcopy(model)
        stats = accumulate_policy_gradient(mine, world.share(rows), config, **options, world=world)
        return gradients(mine), stats.metrics()

    (first, seen), (second, seen_there) = together(part)
    stats = accumulate_policy_gradient(model, rows, config, **options)
    assert_parts_add_up(gradients(model), [first, second])
    assert seen == seen_there == pytest.approx(stats.metrics(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("left", [0, 1, 10])
def test_a_rank_with_nothing_to_train_adds_nothing(left: int) -> None:
    """No phantom token of an idle rank: the other one's gradient is the whole."""
    model, rows = decoder(), make_rows(0)
    for row in rows[:left]:
        row.loss_mask = [False] * len(row.token_ids)

    def part(world: Rank) -> list[Tensor]:
        mine = copy.deepcopy(model)
        half = rows[:left] if world.rank == 0 else rows[left:]
        trained = [row for row in half if row.n_trained]
        accumulate_imitation_gradient(mine, trained, max_tokens=60, world=world)
        accumulate_policy_gradient(mine, half, LossConfig(), temperature=1.0, max_tokens=60, world=world)
        return gradients(mine)

    parts = together(part)
    accumulate_imitation_gradient(model, [row for row in rows if row.n_trained], max_tokens=60)
    accumulate_policy_gradient(model, rows, LossConfig(), temperature=1.0, max_tokens=60)
    assert_parts_add_up(gradients(model), parts)
    assert not any(bool(g.any()) for g in parts[0])


def test_no_two_micro_batches_have_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, seeds = decoder(), make_rows(1), []
    plain = update.trained_hidden

    def noted(model: Any, batch: Any, dropout_seed: int | None = None) -> Tensor:
        seeds.append(dropout_seed)
        return plain(model, batch)

    for module in (update, imitation):
        monkeypatch.setattr(module, "trained_hidden", noted)
    options: dict[str, Any] = {"max_tokens": 20, "dropout_seed": 100}

    def imitate(world: Rank) -> None:
        mine = [row for row in world.share(rows) if row.n_trained]
        accumulate_imitation_gradient(copy.deepcopy(model), mine, **options, world=world)

    def reinforce(world: Rank) -> None:
        accumulate_policy_gradient(
            copy.deepcopy(model), world.share(rows), LossConfig(), temperature=1.0, **options, world=world
        )

    for part in (imitate, reinforce):
        seeds.clear()
        together(part)
        assert len(seeds) == len(set(seeds)) > 6
        assert min(seeds) == 100


@pytest.mark.parametrize("trained", [True, False])
def test_kl_to_the_start_is_over_the_tokens_of_all(trained: bool) -> None:
    reference, rows = decoder(3), make_rows(4) if trained else make_rows(4)[3:4] * 2
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 10_000}
    first, second = together(
        lambda world: kl_to_reference(reference, world.share(rows), **options, world=world)
    )
    expected = kl_to_reference(reference, rows, **options)
    assert [first, second] == pytest.approx([expected, expected], rel=1e-5, nan_ok=True)
    assert (expected == expected) == trained


# ---- groups ------------------------------------------------------------------------------------------------


def make_groups(seed: int, n: int = 5) -> list[Group]:
    """Groups of dialogues with rewards, some unscored, some against an opponent on either side."""
    rng = random.Random(seed)
    groups = []
    for g in range(n):
        scenario = Scenario(game="", id=str(g), split="train", private_text=("", ""), data=None)
        players = [(POLICY, POLICY), (POLICY, "start"), ("step_000002", POLICY)][g % 3]
        dialogues = []
        for _ in range(4):
            views = []
            for role in range(2):
                view = View()
                view.prompt([1, 2, 3])
                view.say(Turn(role=role, kind="utterance", text="", token_ids=[4, 5], logprobs=[-1.0, -2.0]))
                views.append(view)
            scores = (float(rng.randint(0, 3)), float(rng.randint(0, 3)))
            reward = None if rng.random() < 0.2 else (scores[0] / 3 + rng.random() / 9, scores[1] / 3)
            dialogues.append(
                Dialogue(
                    scenario=scenario,
                    first_speaker=0,
                    turns=[],
                    views=tuple(views),
                    players=players,
                    outcome=Outcome(agreed=True, scores=scores),
                    reward=reward,
                )
            )
        groups.append(Group(scenario=scenario, dialogues=dialogues))
    return groups


@pytest.mark.parametrize("roles", ["both", "first"])
@pytest.mark.parametrize("method", METHODS)
def test_advantages_baseline_and_counts_are_those_of_all_groups(method: str, roles: str) -> None:
    config = GrpoSection(advantage=method, train_roles=roles)

    def advantages(groups: Sequence[Group], world: World) -> tuple[Any, ...]:
        baseline = RunningBaseline(means={0: 0.4, 1: 0.6})
        rows, metrics = grpo_rows(groups, config, baseline, world)
        return (
            [row.advantage for row in rows],
            [d.advantage for g in groups for d in g.dialogues],
            metrics,
            baseline,
        )

    groups = make_groups(0)
    first, second = together(lambda world: advantages(copy.deepcopy(world.share(groups)), world))
    rows, of_dialogues, metrics, baseline = advantages(groups, ALONE)
    assert len(rows) > 8
    assert first[0] + second[0] == rows
    assert first[1] + second[1] == of_dialogues
    assert first[2:] == second[2:] == (metrics, baseline)


def test_the_payoff_table_is_that_of_all_groups() -> None:
    groups = make_groups(1)
    whole = payoff_table(groups)
    assert whole.keys() == {"start", "step_000002"}
    assert together(lambda world: payoff_table(world.share(groups), world)) == [whole, whole]


# ---- a trainer ---------------------------------------------------------------------------------------------


def trainer(path: Path, world: World) -> Trainer:
    config = load_config("deal", [*RUN, "imitation.steps=0", "grpo.groups_per_step=5", "train.kl_every=0"])
    return Trainer(
        config, RunDir.create(path, config.to_toml()), Progress(quiet=True), threading.Event(), world
    )


def test_the_ranks_play_the_dialogues_of_one(tmp_path: Path) -> None:
    """Scenarios, first speakers and draws go by the number of a group among all."""
    played = {}
    for name, world in zip(("one", "first", "second"), (World(), *ranks()), strict=True):
        world.each, world.sum = lambda value: [value], list  # they play one after the other
        groups = trainer(tmp_path / name, world).play()
        played[name] = [d.record(step=0) for group in groups for d in group.dialogues]
    assert len(played["first"]) == 2 * 4
    assert played["first"] + played["second"] == played["one"]


def test_all_stop_when_one_is_asked_to(tmp_path: Path) -> None:
    class AskedThere(World):
        def agree(self, flag: bool) -> bool:
            return True

    with pytest.raises(Interrupted, match="stopped after step"):
        trainer(tmp_path / "run", AskedThere())._save_if_due(10)
