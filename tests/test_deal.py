"""The deal game against brute force written anew here, its known constants, and every way a statement can
be wrong.
"""

from __future__ import annotations

import itertools
import random
import re
from statistics import fmean
from typing import Any

import pytest
from duologue.rollout.games.deal import (
    FAILURES,
    Deal,
    DealGame,
    DealSettings,
    class_of,
    contexts,
    count_vectors,
    draw_contexts,
    frontier,
    summarise,
)
from duologue.rollout.games.game import Outcome

GAME = DealGame()
EVERYTHING = contexts()
DEAL = Deal((1, 2, 3), ((4, 0, 2), (1, 3, 1)))
SCENARIO = GAME.scenario(DEAL, "train")


def points(deal: Deal) -> list[tuple[int, int]]:
    """The scores of every allocation: an oracle that shares no code with the game."""
    found = []
    for take in itertools.product(*[range(c + 1) for c in deal.counts]):
        mine = sum(v * t for v, t in zip(deal.values[0], take, strict=True))
        yours = sum(v * (c - t) for v, c, t in zip(deal.values[1], deal.counts, take, strict=True))
        found.append((mine, yours))
    return found


def is_pareto(p: tuple[int, int], among: set[tuple[int, int]]) -> bool:
    return all((q[0] <= p[0] and q[1] <= p[1]) or q[0] < p[0] or q[1] < p[1] for q in among)


def test_sizes_of_the_game() -> None:
    assert len(count_vectors()) == 28
    assert len(EVERYTHING) == len(set(EVERYTHING)) == 5295
    assert len({class_of(deal) for deal in EVERYTHING}) == 475


def test_every_context_keeps_the_rules() -> None:
    for deal in EVERYTHING:
        assert 5 <= sum(deal.counts) <= 7
        assert all(1 <= c <= 4 for c in deal.counts)
        for values in deal.values:
            assert sum(v * c for v, c in zip(values, deal.counts, strict=True)) == 10
        pairs = list(zip(*deal.values, strict=True))
        assert all(a + b > 0 for a, b in pairs)
        assert any(a * b > 0 for a, b in pairs)


def test_frontier_and_what_a_random_allocation_reaches() -> None:
    """Over all ordered contexts alike. The reference values are from contexts whose weights are not known."""
    pareto, joint, nash, best = [], [], [], []
    for deal in EVERYTHING:
        reached = points(deal)
        distinct = set(reached)
        best_joint, best_nash = max(a + b for a, b in reached), max(a * b for a, b in reached)
        front = {p for p in distinct if is_pareto(p, distinct)}
        pareto.append(fmean(p in front for p in reached))
        joint.append(fmean((a + b) / best_joint for a, b in reached))
        nash.append(fmean(a * b / best_nash for a, b in reached))
        best.append(best_joint)
        found = frontier(deal)
        assert (found.best_joint, found.best_nash, set(found.pareto)) == (best_joint, best_nash, front)
    for found_mean, exact, reference, slack in (
        (fmean(pareto), 0.2299, 0.239, 0.01),
        (fmean(joint), 0.6795, 0.682, 0.003),
        (fmean(nash), 0.3675, 0.368, 0.001),
        (fmean(best), 15.058, 15.0, 0.06),
    ):
        assert found_mean == pytest.approx(exact, abs=1e-4 if exact < 1 else 1e-3)
        assert abs(found_mean - reference) < slack


def test_nash_point_breaks_ties_by_sum_then_by_gap() -> None:
    ties = 0
    for deal in EVERYTHING:
        reached = set(points(deal))
        best = max(a * b for a, b in reached)
        top = {p for p in reached if p[0] * p[1] == best}
        widest = {p for p in top if sum(p) == max(map(sum, top))}
        closest = {p for p in widest if abs(p[0] - p[1]) == min(abs(a - b) for a, b in widest)}
        assert frontier(deal).nash_point in closest
        ties += len({sum(p) for p in top}) > 1
    assert ties > 0, "no context tests the tie"


def test_judge_agrees_with_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scenario = GAME.sample(rng, "train")
        deal = scenario.data
        take = tuple(rng.randint(0, c) for c in deal.counts)
        rest = tuple(c - t for c, t in zip(deal.counts, take, strict=True))
        outcome = GAME.judge(scenario, (GAME.statement(take), GAME.statement(rest)))
        reached = points(deal)
        own = reached[list(itertools.product(*[range(c + 1) for c in deal.counts])).index(take)]
        assert outcome.agreed
        assert not outcome.failure
        assert outcome.scores == own
        assert outcome.metrics == {
            "pareto": float(is_pareto(own, set(reached))),
            "joint_ratio": sum(own) / max(a + b for a, b in reached),
            "nash_ratio": own[0] * own[1] / max(a * b for a, b in reached),
        }


def test_no_held_out_context_has_a_twin_in_training() -> None:
    train, heldout = GAME.splits["train"], GAME.splits["heldout"]
    seen = {class_of(deal) for deal in train}
    unseen = {class_of(deal) for deal in heldout}
    assert len(unseen) == 95
    assert len(seen) == 380
    assert not seen & unseen
    assert len(train) + len(heldout) == 5295
    twins = set(train)
    for deal in heldout:
        for order in itertools.permutations(range(3)):
            counts, *values = ([row[k] for k in order] for row in (deal.counts, *deal.values))
            for first, second in itertools.permutations(values):
                assert Deal(tuple(counts), (tuple(first), tuple(second))) not in twins


def test_sample_draws_from_the_split_with_the_generator_alone() -> None:
    other = DealGame()
    for seed, split in itertools.product(range(20), ("train", "heldout")):
        assert GAME.sample(random.Random(seed), split) == other.sample(random.Random(seed), split)
    assert len({GAME.sample(random.Random(seed), "train").id for seed in range(20)}) == 20
    assert GAME.sample(random.Random(3), "heldout").data in GAME.splits["heldout"]
    with pytest.raises(ValueError, match="split = 'test': accepted is one of train, heldout"):
        GAME.sample(random.Random(0), "test")


def test_private_text_says_counts_and_own_values_only() -> None:
    assert SCENARIO.private_text == (
        "1 book worth 4 , 2 hat worth 0 , 3 ball worth 2",
        "1 book worth 1 , 2 hat worth 3 , 3 ball worth 1",
    )
    for deal in EVERYTHING[::97]:
        for side, text in enumerate(GAME.scenario(deal, "train").private_text):
            parts = re.findall(r"(\d+) (\w+) worth (\d+)", text)
            assert [(int(c), item, int(v)) for c, item, v in parts] == list(
                zip(deal.counts, ("book", "hat", "ball"), deal.values[side], strict=True)
            )
    assert len({GAME.scenario(deal, "train").id for deal in EVERYTHING}) == 5295


@pytest.mark.parametrize(
    ("text", "take"),
    [
        ("book 1 hat 0 ball 2", (1, 0, 2)),
        ("book 12 hat 0 ball 2", (12, 0, 2)),
        ("book 1 hat 0", None),
        ("hat 0 book 1 ball 2", None),
        ("book 1 hat 0 ball 2 .", None),
        (" book 1 hat 0 ball 2", None),
        ("book 1  hat 0 ball 2", None),
        ("book 1 hat 0 ball 2\n", None),
        ("Book 1 hat 0 ball 2", None),
        ("book -1 hat 0 ball 2", None),
        ("book 01 hat 0 ball 2", None),
        ("book ١ hat 0 ball 2", None),
        ("book 99999999999999999999 hat 0 ball 2", None),
        ("books 1 hats 0 balls 2", None),
        ("book one hat 0 ball 2", None),
        ("", None),
    ],
)
def test_statements_are_read_strictly(text: str, take: tuple[int, ...] | None) -> None:
    assert GAME.parse(text) == take


@pytest.mark.parametrize(
    ("finals", "failure"),
    [
        (None, "no_close"),
        (("book 1 hat 0 ball 3", "i take the hats"), "malformed"),
        (("", "book 0 hat 2 ball 0"), "malformed"),
        (("book 2 hat 0 ball 3", "book 0 hat 2 ball 0"), "out_of_range"),
        (("book 1 hat 0 ball 0", "book 0 hat 3 ball 0"), "out_of_range"),
        (("book 1 hat 1 ball 3", "book 0 hat 2 ball 0"), "conflict"),
        (("book 1 hat 2 ball 3", "book 0 hat 0 ball 1"), "conflict"),
        (("book 1 hat 0 ball 2", "book 0 hat 2 ball 0"), "leftover"),
        (("book 0 hat 0 ball 0", "book 0 hat 0 ball 0"), "leftover"),
        (("book 1 hat 1 ball 2", "book 0 hat 2 ball 0"), "conflict"),  # though a ball is left too
        (("book 1 hat 0 ball 3", "book 0 hat 2 ball 0"), None),
    ],
)
def test_failures_by_kind(finals: tuple[str, str] | None, failure: str | None) -> None:
    outcome = GAME.judge(SCENARIO, finals)
    assert outcome.failure == failure
    assert outcome.agreed == (failure is None)
    assert outcome.scores == ((10.0, 6.0) if failure is None else (0.0, 0.0))
    assert bool(outcome.metrics) == (failure is None)


def test_close_is_the_marker_at_the_end() -> None:
    assert GAME.closes("deal . <selection>")
    assert GAME.closes("<selection>")
    assert not GAME.closes("say <selection> when you are done .")
    assert not GAME.closes("selection")


def test_rewards_of_a_deal_and_of_none() -> None:
    deal = GAME.judge(
        SCENARIO, ("book 1 hat 1 ball 3", "book 0 hat 1 ball 0")
    )  # 10 and 3; the best is 10 and 6
    none = GAME.judge(SCENARIO, None)
    games = {o: DealGame(DealSettings(objective=o)) for o in ("cooperative", "nash", "selfish")}
    assert games["cooperative"].rewards(SCENARIO, deal) == (13 / 16, 13 / 16)
    assert games["nash"].rewards(SCENARIO, deal) == (30 / 60, 30 / 60)
    assert games["selfish"].rewards(SCENARIO, deal) == (1.0, 0.3)
    for game in games.values():
        assert game.rewards(SCENARIO, none) == (0.0, 0.0)
    with pytest.raises(
        ValueError, match="objective = 'greedy': accepted is one of 'cooperative', 'nash', 'selfish'"
    ):
        DealGame(DealSettings(objective="greedy"))


def test_walking_away_beats_a_deal_below_it() -> None:
    game = DealGame(DealSettings(walk_away=4, objective="selfish"))
    deal = game.judge(SCENARIO, ("book 1 hat 1 ball 3", "book 0 hat 1 ball 0"))
    with_deal, without = (game.rewards(SCENARIO, o) for o in (deal, game.judge(SCENARIO, None)))
    assert without == (0.4, 0.4)
    assert with_deal[0] > without[0]
    assert with_deal[1] < without[1]
    assert GAME.rewards(SCENARIO, game.judge(SCENARIO, None)) == (0.0, 0.0)


def test_summary_counts_the_failed_as_zero_only_where_it_says_so() -> None:
    good = Outcome(
        agreed=True, scores=(10.0, 6.0), metrics={"pareto": 1.0, "joint_ratio": 1.0, "nash_ratio": 0.9}
    )
    poor = Outcome(
        agreed=True, scores=(2.0, 4.0), metrics={"pareto": 0.0, "joint_ratio": 0.5, "nash_ratio": 0.1}
    )
    none = [Outcome(agreed=False, scores=(0.0, 0.0), failure=kind) for kind in ("conflict", "no_close")]
    found = summarise([good, poor, *none])
    assert found == {
        "dialogues": 4,
        "agreement": 0.5,
        "pareto": 0.5,
        "joint_ratio": 0.75,
        "nash_ratio": 0.5,
        "joint_all": 0.375,
        "score_0": 3.0,
        "score_1": 2.5,
        "score_agreed_0": 6.0,
        "score_agreed_1": 5.0,
        **{f"failure_{kind}": 0.25 if kind in ("conflict", "no_close") else 0.0 for kind in FAILURES},
    }
    assert summarise(none)["joint_ratio"] == summarise([])["agreement"] == 0.0


@pytest.mark.parametrize(("types", "total"), [(4, 20), (5, 20), (4, 8)])
def test_larger_variants(types: int, total: int) -> None:
    game = DealGame(DealSettings(item_types=types, total_value=total))
    train, heldout = game.splits["train"], game.splits["heldout"]
    assert len(set(train) | set(heldout)) == len(train) + len(heldout) == (13_131 if total == 8 else 20_000)
    assert not {class_of(d) for d in train} & {class_of(d) for d in heldout}
    for deal in heldout[::500]:
        assert all(
            sum(v * c for v, c in zip(values, deal.counts, strict=True)) == total for values in deal.values
        )
        assert all(a + b for a, b in zip(*deal.values, strict=True))
    assert DealGame(DealSettings(item_types=types, total_value=total)).splits["train"] == train
    text = game.statement(train[0].counts)
    assert text.startswith(f"book {train[0].counts[0]} hat ")
    assert game.parse(text) == train[0].counts


def test_a_draw_is_even_over_the_contexts() -> None:
    drawn = draw_contexts(3, 10, 2000, seed=1)
    assert set(drawn) <= set(EVERYTHING)
    assert len(set(drawn)) == 2000

    def share(deals: list[Deal]) -> float:
        return fmean(
            deal.counts == (1, 1, 3) or deal.counts == (1, 3, 1) or deal.counts == (3, 1, 1) for deal in deals
        )

    assert share(drawn) == pytest.approx(share(EVERYTHING), abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item_types": 2}, "game.item_types = 2: accepted is 3 to 5"),
        ({"item_types": 6}, "game.item_types = 6: accepted is 3 to 5"),
        (
            {"walk_away": 11.0, "objective": "selfish"},
            "game.walk_away = 11.0: accepted is 0 to the total value 10",
        ),
    ],
)
def test_impossible_games_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DealGame(DealSettings(**arguments))


def test_a_total_that_leaves_no_contexts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"game\.total_value = 2: accepted is 5 to 40"):
        DealGame(DealSettings(total_value=2))
