"""The priorities game against brute force written anew here, random allocations' exact values, and what its
scripts say.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from statistics import fmean

import pytest
from duologue.rollout.games.catalogue import corpus
from duologue.rollout.games.deal import Deal, Vector, class_of
from duologue.rollout.games.deal_scripts import scripted_dialogue
from duologue.rollout.games.deal_words import Language, utter
from duologue.rollout.games.priorities import Camper, PrioritiesGame
from duologue.rollout.games.scripted import Act, ScriptedDialogue, phrases
from duologue.rollout.games.selection import CLOSE, SelectionSettings

GAME = PrioritiesGame()
CORPUS = corpus(GAME, 3000, seed=9)
ITEMS = ("food", "water", "firewood")
ORDERS = list(itertools.permutations((5, 4, 3)))
TAKES = list(itertools.product(range(4), repeat=3))
DEAL = Deal((3, 3, 3), ((5, 4, 3), (4, 5, 3)))  # best joint 27 + 12, best Nash 21 * 18
SCENARIO = GAME.scenario(DEAL, "train")


def points(first: Vector, second: Vector, take: Vector) -> tuple[int, int]:
    mine = sum(v * t for v, t in zip(first, take, strict=True))
    return mine, sum(v * (3 - t) for v, t in zip(second, take, strict=True))


def dominated(p: tuple[int, int], among: set[tuple[int, int]]) -> bool:
    return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in among)


def finals(take: Vector) -> tuple[str, str]:
    first, second = (
        " ".join(f"{i} {n}" for i, n in zip(ITEMS, each, strict=True))
        for each in (take, [3 - t for t in take])
    )
    return first, second


def test_contexts_split_by_how_the_orders_compare() -> None:
    train, heldout = GAME.splits["train"], GAME.splits["heldout"]
    assert sorted(deal.values for deal in train + heldout) == sorted(itertools.product(ORDERS, repeat=2))
    assert {deal.counts for deal in train + heldout} == {(3, 3, 3)}
    assert len({class_of(d) for d in train}) == 4
    assert len({class_of(d) for d in heldout}) == 1
    assert (len(train), len(heldout)) == (24, 12)
    twins = set(train)
    for deal in heldout:
        for order, (a, b) in itertools.product(itertools.permutations(range(3)), ((0, 1), (1, 0))):
            twin = Deal(
                (3, 3, 3), (tuple(deal.values[a][k] for k in order), tuple(deal.values[b][k] for k in order))
            )
            assert twin not in twins
    pairs = {pair for deal in train for pair in zip(*deal.values, strict=True)}
    assert {pair for deal in heldout for pair in zip(*deal.values, strict=True)} < pairs, (
        "no new pair of ranks, only new triples"
    )


def test_judge_agrees_with_brute_force_everywhere_and_what_a_random_allocation_reaches() -> None:
    outcomes, oracle = [], []
    for first, second in itertools.product(ORDERS, repeat=2):
        scenario = GAME.scenario(Deal((3, 3, 3), (first, second)), "train")
        reached = {take: points(first, second, take) for take in TAKES}
        among = set(reached.values())
        best_joint, best_nash = max(a + b for a, b in among), max(a * b for a, b in among)
        for take, own in reached.items():
            outcome = GAME.judge(scenario, finals(take))
            expected = (float(not dominated(own, among)), sum(own) / best_joint, own[0] * own[1] / best_nash)
            assert outcome.agreed
            assert outcome.scores == own
            assert tuple(outcome.metrics[key] for key in ("pareto", "joint_ratio", "nash_ratio")) == expected
            outcomes.append(outcome)
            oracle.append(expected)
    found = GAME.summarise(outcomes)
    pareto, joint, nash = (fmean(values) for values in zip(*oracle, strict=True))
    assert (found["pareto"], found["joint_ratio"], found["nash_ratio"]) == pytest.approx(
        (pareto, joint, nash)
    )
    assert (pareto, joint, nash) == pytest.approx((0.40625, 0.90293, 0.68062), abs=1e-5)
    assert found["agreement"] == 1.0
    assert found["score_0"] == found["score_1"] == 18.0


def test_private_text_is_the_own_order_in_words() -> None:
    assert SCENARIO.private_text == (
        "food high , water medium , firewood low",
        "food medium , water high , firewood low",
    )
    ids = set()
    for first, second in itertools.product(ORDERS, repeat=2):
        scenario = GAME.scenario(Deal((3, 3, 3), (first, second)), "train")
        for values, text in zip((first, second), scenario.private_text, strict=True):
            said = re.findall(r"(\w+) (high|medium|low)", text)
            assert [(item, {"high": 5, "medium": 4, "low": 3}[rank]) for item, rank in said] == list(
                zip(ITEMS, values, strict=True)
            )
        ids.add(scenario.id)
    assert len(ids) == 36


@pytest.mark.parametrize(
    ("statements", "failure"),
    [
        (None, "no_close"),
        (("food 3 water 0 firewood 1", "i take the rest"), "malformed"),
        (("food 3 water 0", "food 0 water 3 firewood 2"), "malformed"),
        (("book 3 hat 0 ball 1", "food 0 water 3 firewood 2"), "malformed"),
        (("food 4 water 0 firewood 1", "food 0 water 3 firewood 2"), "out_of_range"),
        (("food 3 water 0 firewood 1", "food 1 water 3 firewood 2"), "conflict"),
        (("food 3 water 0 firewood 1", "food 0 water 3 firewood 1"), "leftover"),
        (("walk away", "walk away"), "walk_away"),
        (("walk away", "food 0 water 3 firewood 2"), "walk_away"),  # one side alone can
        (("nonsense", "walk away"), "walk_away"),
        (("walk away now", "walk away now"), "malformed"),
        (("food 3 water 0 firewood 1", "food 0 water 3 firewood 2"), None),
    ],
)
def test_failures_by_kind(statements: tuple[str, str] | None, failure: str | None) -> None:
    outcome = GAME.judge(SCENARIO, statements)
    assert outcome.failure == failure
    assert outcome.agreed == (failure is None)
    assert outcome.scores == {None: (18.0, 21.0), "walk_away": (5.0, 5.0)}.get(failure, (0.0, 0.0))


def test_rewards_of_a_deal_a_walk_away_and_a_failure() -> None:
    def rewards(statements: tuple[str, str] | None) -> list[tuple[float, float]]:
        outcome = GAME.judge(SCENARIO, statements)
        objectives = ("cooperative", "nash", "selfish")
        games = [PrioritiesGame(SelectionSettings(objective=o)) for o in objectives]
        return [game.rewards(SCENARIO, outcome) for game in games]

    best_joint, best_nash = 39, 21 * 18
    assert rewards(finals((3, 0, 1))) == [(1.0, 1.0), (1.0, 1.0), (18 / 36, 21 / 36)]
    assert rewards(finals((3, 3, 3))) == [(36 / best_joint,) * 2, (0.0, 0.0), (1.0, 0.0)]
    assert rewards(("walk away", "")) == [(10 / best_joint,) * 2, (25 / best_nash,) * 2, (5 / 36, 5 / 36)]
    assert rewards(("x", "y")) == [(0.0, 0.0), (0.0, 0.0), (5 / 36, 5 / 36)]
    for objective in range(
        3
    ):  # cooperative alone prefers any deal to none, even one that leaves a side nothing
        bad, walk = (
            rewards(finals((3, 3, 3)))[objective][1],
            rewards(("walk away", "walk away"))[objective][1],
        )
        assert (bad < walk) == (objective > 0)


def test_summary_counts_walking_away() -> None:
    given = [finals((3, 0, 1)), finals((3, 3, 3)), ("walk away", "x"), None]
    found = GAME.summarise([GAME.judge(SCENARIO, statements) for statements in given])
    assert found["agreement"] == found["score_agreed_1"] / 21 == 0.5
    assert found["failure_walk_away"] == found["failure_no_close"] == 0.25
    assert found["pareto"] == 1.0
    assert found["joint_ratio"] == pytest.approx((1 + 36 / 39) / 2)
    assert (found["score_0"], found["score_1"]) == ((18 + 36 + 5) / 4, (21 + 0 + 5) / 4)
    assert sum(value for key, value in found.items() if key.startswith("failure")) == 0.5


# ---- scripts -----------------------------------------------------------------------------------------------

AMOUNT = r"(?:all )?(\d) (food|water|firewood)"
SPLIT = re.compile(
    rf"(?:{AMOUNT}|(food|water|firewood) \w+ to \w+(?: , (\d))?) for (me|you)(?: and (\d) for you)?"
)
SHARES = re.compile(r"(?:^| )((?:all )?\d [^,?.]*?|nothing) for me , (.*) for you [.?]")


def utterances(dialogue: ScriptedDialogue) -> list[tuple[int, str]]:
    return [(side, text) for side, text, kind in dialogue.turns if kind == "utterance"]


def amounts(text: str) -> Vector:
    found = {item: int(n) for n, item in re.findall(AMOUNT, text)}
    return tuple(found.get(item, 0) for item in ITEMS)


def read_offer(text: str) -> tuple[Vector, Vector] | None:
    """(what the speaker takes, what the other gets) from the words alone: item by item, compared, or share
    by share.
    """
    by_item = {m[2] or m[3]: m for m in SPLIT.finditer(text)}
    if len(by_item) == 3:
        mine = []
        for item in ITEMS:
            m = by_item[item]
            whole = int(m[1] or m[4] or 3)
            mine.append(whole if m[5] == "me" else 3 - whole)
            assert m[6] is None or int(m[6]) == 3 - mine[-1], text
        return tuple(mine), tuple(3 - n for n in mine)
    for pattern, first in (
        (SHARES, 0),
        (r"i (?:take|get) (.*) (?:,|and) you (?:take|get) (.*) [.?]", 0),
        (r"let me have (.*) and you keep (.*) \.", 0),
        (r"give me (.*) and take (.*) \?", 0),
        (r"you (?:get|could have) (.*) , (?:i get|and i) (.*) \.", 1),
    ):
        if match := re.search(pattern, text):
            return amounts(match[1 + first]), amounts(match[2 - first])
    return None


def test_finals_are_what_the_accepted_words_say() -> None:
    agreed = 0
    for dialogue in CORPUS:
        for (side, offer), (_, answer) in itertools.pairwise(utterances(dialogue)):
            if answer.removesuffix(f" {CLOSE}") in phrases("deal")["agree"]:
                read = read_offer(offer)
                assert read is not None, offer
                assert [a + b for a, b in zip(*read, strict=True)] == [3, 3, 3], offer
                stated = {who: text for who, text, kind in dialogue.turns if kind == "final"}
                assert (stated[side], stated[1 - side]) == finals(read[0]), offer
                assert dialogue.outcome.scores == points(*dialogue.scenario.data.values, read[side])
                agreed += 1
    assert agreed >= 0.98 * sum(d.outcome.agreed for d in CORPUS) > 1500


def test_stated_orders_are_true() -> None:
    stated = compared = 0
    for dialogue in CORPUS:
        orders = [
            dict(re.findall(r"(\w+) (high|medium|low)", text)) for text in dialogue.scenario.private_text
        ]
        for side, text in utterances(dialogue):
            said = re.findall(r"(food|water|firewood) (?:is )?(high|medium|low)\b(?! to)", text)
            stated += bool(said)
            assert not said or dict(said) == orders[side], text
            for item, mine, yours in re.findall(r"(\w+) (high|medium|low) to (high|medium|low)", text):
                compared += 1
                assert (mine, yours) == (orders[side][item], orders[1 - side][item]), text
    assert stated > len(CORPUS) / 2
    assert compared > len(CORPUS) / 2


def test_the_mixture_leaves_much_to_gain_and_two_open_sides_nothing() -> None:
    found = GAME.summarise([d.outcome for d in CORPUS])
    assert 0.7 < found["agreement"] < 0.9
    assert 0.6 < found["pareto"] < 0.8
    assert 0.75 < found["nash_ratio"] < 0.9
    assert found["failure_walk_away"] > 0.1
    assert found["failure_no_close"] > 0.01
    both = GAME.summarise([d.outcome for d in CORPUS if d.temperaments == ("open", "open")])
    assert both["dialogues"] > 0.15 * len(CORPUS)
    assert both["agreement"] == both["pareto"] == both["nash_ratio"] == 1.0
    refusals = sum(
        text.startswith(("no ", "not ", "sorry , ", "i need more"))
        for d in CORPUS
        for _, text in utterances(d)
    )
    assert refusals > 0.5 * len(CORPUS)


def test_who_leaves_walks_away() -> None:
    kinds = Counter()
    for dialogue in CORPUS:
        _, last = utterances(dialogue)[-1]
        if last.startswith(
            (
                "then there is no deal",
                "i would rather leave",
                "we will not",
                "forget it",
                "this leads",
                "no deal then",
            )
        ):
            assert last.endswith(CLOSE)
            kinds[dialogue.outcome.failure] += 1
    assert kinds["walk_away"] > 0.1 * len(CORPUS)
    assert sum(kinds.values()) - kinds["walk_away"] < 0.02 * len(
        CORPUS
    )  # both hasty, and still naming what they would like


def test_nobody_peeks() -> None:
    """With another order on the other side, a side's words stay the same while what it hears does."""
    rng = random.Random(2)
    compared = changed = 0
    for _ in range(600):
        mine, theirs, other = (rng.choice(ORDERS) for _ in range(3))
        seed = rng.getrandbits(32)
        scenarios = [GAME.scenario(Deal((3, 3, 3), (mine, values)), "train") for values in (theirs, other)]
        first, second = (
            utterances(scripted_dialogue(GAME, scenario, random.Random(seed), Camper))
            for scenario in scenarios
        )
        for (side, text), (_, twin) in zip(first, second, strict=False):
            if side == 1 and text != twin:
                changed += 1
                break
            if side == 0:
                compared += 1
                assert text == twin
    assert compared > 400
    assert changed > 200, "the twins hardly differ: nothing was tested"


@pytest.mark.parametrize(("mine", "theirs"), list(itertools.product(ORDERS[:2], ORDERS)))
def test_an_open_side_offers_the_best_nash_point_once_it_knows(mine: Vector, theirs: Vector) -> None:
    best = max(a * b for a, b in (points(mine, theirs, take) for take in TAKES))
    side = Camper(mine, "open", random.Random(0), game=GAME, counts=(3, 3, 3), revealed=True)
    side.hear(Act(reveal=theirs))
    takes = {act.take for act in (side.act() for _ in range(10)) if act.take is not None}
    assert len(takes) == 1
    a, b = points(mine, theirs, takes.pop())
    assert a * b == best


def test_items_have_no_plural() -> None:
    rng = random.Random(0)
    language: Language = Camper.language
    acts = (Act(want=0), Act(take=(3, 2, 0)), Act(take=(2, 0, 3), best=True), Act(reveal=(5, 3, 4)))
    said = {utter(act, (3, 3, 3), language, rng, told=False, left=False) for act in acts for _ in range(200)}
    assert not any(word in text.split() for text in said for word in ("foods", "waters", "firewoods", "5"))
    assert len(said) > 60
