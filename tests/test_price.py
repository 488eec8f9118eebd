"""The price game against brute force written anew here, a random policy's exact values, and what its
scripts say.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from statistics import fmean
from typing import Any

import pytest
from duologue.grpo.build import build_corpus, build_game
from duologue.grpo.config import load_config
from duologue.grpo.imitation import demonstration_rows
from duologue.model.tokenizer import train_tokenizer
from duologue.rollout.games import english
from duologue.rollout.games.catalogue import corpus, kind_of
from duologue.rollout.games.game import Outcome
from duologue.rollout.games.price import Haggle, Haggler, PriceGame, scripted_dialogue
from duologue.rollout.games.price_english import FILES
from duologue.rollout.games.scripted import Act, ScriptedDialogue, phrases
from duologue.rollout.games.selection import CLOSE, SelectionSettings

GAME = PriceGame()
CONTEXTS = [*GAME.splits["train"], *GAME.splits["heldout"]]
CORPUS = corpus(GAME, 4000, seed=3)
ROOM = GAME.scenario(Haggle(20, 13, 1), "train")  # side 1 buys; 7 to share
NO_ROOM = GAME.scenario(Haggle(11, 14, 0), "train")


def agree(haggle: Haggle, price: int) -> Outcome:
    return GAME.judge(GAME.scenario(haggle, "train"), (f"price {price}", f"price {price}"))


def by_hand(haggle: Haggle, price: int) -> tuple[float, float]:
    """The gains of the two sides, from the private texts alone."""
    found = []
    for text in GAME.scenario(haggle, "train").private_text:
        verb, limit, bound = re.fullmatch(r"(buy|sell) for (\d+) at (most|least)", text).groups()  # type: ignore[union-attr]
        assert (verb, bound) in (("buy", "most"), ("sell", "least"))
        found.append(float(int(limit) - price if verb == "buy" else price - int(limit)))
    return found[0], found[1]


def test_the_contexts_and_their_split() -> None:
    assert len(CONTEXTS) == len(set(CONTEXTS)) == 2 * 319
    assert len({GAME.scenario(h, "train").id for h in CONTEXTS}) == len(CONTEXTS)
    zones = {h.most - h.least for h in CONTEXTS}
    assert zones == {*range(-6, -1), *range(2, 13)}
    assert 0.3 < fmean(h.most < h.least for h in CONTEXTS) < 0.4
    train = {(h.most, h.least) for h in GAME.splits["train"]}
    heldout = {(h.most, h.least) for h in GAME.splits["heldout"]}
    assert not train & heldout, "a held-out context is a training one with the seats swapped"
    assert len(heldout) == 64
    assert 0.2 < fmean(most < least for most, least in heldout) < 0.5


def test_judge_agrees_with_brute_force() -> None:
    for haggle in CONTEXTS[::5]:
        every = [by_hand(haggle, price) for price in range(100)]
        best = max((a * b for a, b in every if a >= 0 and b >= 0), default=None)
        assert (best is not None) == (haggle.zone > 0)
        for price in range(60):
            found, gains = agree(haggle, price), every[price]
            assert found.agreed
            assert found.scores == gains
            good = min(gains) >= 0
            assert found.metrics["zone"] == (best is not None)
            assert found.metrics["wrong"] == (not good)
            assert found.metrics["right"] == good
            assert found.metrics["nash_ratio"] == (gains[0] * gains[1] / best if good and best else 0.0)
            if good:
                buyer = 0 if "buy" in GAME.scenario(haggle, "train").private_text[0] else 1
                assert found.metrics["share_buyer"] == gains[buyer] / sum(gains)
                assert found.metrics["share_seller"] == gains[1 - buyer] / sum(gains)


def test_what_a_random_price_reaches() -> None:
    """Both state the same price from 1 to 40, all alike, over all contexts; exact, from the numbers of the
    zones alone.
    """
    found = GAME.summarise([agree(haggle, price) for haggle in CONTEXTS for price in range(1, 41)])
    n_of = {g: 26 - abs(g) for g in (*range(-6, -1), *range(2, 13))}
    zones = {g: n for g, n in n_of.items() if g > 0}
    right = sum(n * (g + 1) for g, n in zones.items())
    products = {g: [k * (g - k) for k in range(g + 1)] for g in zones}
    assert found["agreement"] == 1.0
    assert (
        found["efficiency"]
        == pytest.approx(right / (40 * sum(zones.values())))
        == pytest.approx(0.1868, abs=1e-4)
    )
    assert (
        found["wrong_deals"]
        == pytest.approx(1 - right / (40 * sum(n_of.values())))
        == pytest.approx(0.8776, abs=1e-4)
    )
    nash = sum(n * sum(products[g]) / max(products[g]) for g, n in zones.items()) / right
    assert found["nash_ratio"] == pytest.approx(nash) == pytest.approx(0.5664, abs=1e-4)
    assert found["share_buyer"] == pytest.approx(0.5)
    assert found["right_walks"] == 0.0


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("price 14", 14),
        ("price 0", 0),
        ("price 99", 99),
        ("price 100", None),
        ("price 014", None),
        ("price -3", None),
        (" price 14", None),
        ("price 14 .", None),
        ("price 14\n", None),
        ("Price 14", None),
        ("price ١٤", None),
        ("price fourteen", None),
        ("14", None),
        ("price", None),
        ("", None),
        ("walk away", None),
    ],
)
def test_statements_are_read_strictly(text: str, price: int | None) -> None:
    assert GAME.parse(text) == price


@pytest.mark.parametrize(
    ("finals", "failure"),
    [
        (None, "no_close"),
        (("price 14", "i pay 14"), "malformed"),
        (("", ""), "malformed"),
        (("price 14", "price 15"), "mismatch"),
        (("walk away", "walk away"), "walk_away"),
        (("walk away", "price 14"), "walk_away"),  # one side alone can
        (("price 14", "walk away"), "walk_away"),
        (("walk away .", "walk away ."), "malformed"),
        (("price 14", "price 14"), None),
    ],
)
def test_failures_by_kind(finals: tuple[str, str] | None, failure: str | None) -> None:
    outcome = GAME.judge(ROOM, finals)
    assert outcome.failure == failure
    assert outcome.agreed == (failure is None)
    assert outcome.scores == ((1.0, 6.0) if failure is None else (0.0, 0.0))
    assert outcome.metrics["right"] == (failure is None)
    assert GAME.judge(NO_ROOM, finals).metrics["right"] == (failure == "walk_away")


def test_rewards() -> None:
    def rewards(scenario: object, finals: tuple[str, str] | None) -> list[tuple[float, float]]:
        outcome = GAME.judge(scenario, finals)  # type: ignore[arg-type]
        objectives = ("cooperative", "nash", "selfish")
        games = [PriceGame(SelectionSettings(objective=o)) for o in objectives]
        return [game.rewards(scenario, outcome) for game in games]  # type: ignore[arg-type]

    walk = ("walk away", "walk away")
    nothing = [(0.0, 0.0)] * 3
    assert rewards(ROOM, ("price 14", "price 14")) == [(1.0, 1.0), (6 / 12, 6 / 12), (1 / 12, 6 / 12)]
    assert rewards(ROOM, ("price 13", "price 13")) == [(1.0, 1.0), (0.0, 0.0), (0.0, 7 / 12)]
    assert rewards(ROOM, ("price 21", "price 21")) == [
        (0.0, 0.0),
        (0.0, 0.0),
        (8 / 12, -1 / 12),
    ]  # wrong for the buyer
    assert rewards(ROOM, walk) == rewards(ROOM, None) == nothing
    assert rewards(NO_ROOM, walk) == [(1.0, 1.0), (1.0, 1.0), (0.0, 0.0)]
    assert rewards(NO_ROOM, ("price 12", "price 12")) == [(0.0, 0.0), (0.0, 0.0), (-1 / 12, -2 / 12)]
    assert rewards(NO_ROOM, None) == nothing


def test_summary_by_hand() -> None:
    finals = {
        "room": [
            ("price 16", "price 16"),
            ("price 13", "price 13"),
            ("price 30", "price 30"),
            ("walk away", "price 16"),
            None,
        ],
        "none": [("walk away", "walk away"), ("price 12", "price 12"), ("price 1", "x")],
    }
    outcomes = [GAME.judge(ROOM, f) for f in finals["room"]] + [
        GAME.judge(NO_ROOM, f) for f in finals["none"]
    ]
    assert GAME.summarise(outcomes) == {
        "dialogues": 8.0,
        "agreement": 3 / 5,
        "efficiency": 2 / 5,
        "right_walks": 1 / 3,
        "wrong_deals": 2 / 4,
        "share_buyer": pytest.approx((4 / 7 + 1) / 2),
        "share_seller": pytest.approx((3 / 7 + 0) / 2),
        "nash_ratio": 0.5,
        "failure_no_close": 1 / 8,
        "failure_malformed": 1 / 8,
        "failure_mismatch": 0.0,
        "failure_walk_away": 2 / 8,
    }
    assert set(GAME.summarise([]).values()) == {0.0}


# ---- scripts -----------------------------------------------------------------------------------------------


def utterances(dialogue: ScriptedDialogue) -> list[tuple[int, str]]:
    return [(side, text) for side, text, kind in dialogue.turns if kind == "utterance"]


def test_the_price_agreed_is_the_last_one_named() -> None:
    agreed = 0
    for dialogue in CORPUS:
        for (_, offer), (_, answer) in itertools.pairwise(utterances(dialogue)):
            if answer.removesuffix(f" {CLOSE}") in phrases("deal")["agree"]:
                price = int(re.findall(r"\d+", offer)[-1])
                finals = [text for _, text, kind in dialogue.turns if kind == "final"]
                assert finals == [f"price {price}"] * 2
                assert dialogue.outcome.scores == by_hand(dialogue.scenario.data, price)
                agreed += 1
    assert agreed == sum(d.outcome.agreed for d in CORPUS) > 2000


def test_stated_limits_are_true() -> None:
    limit = re.compile(
        r"(?:i can pay|i need) (\d+) at (?:most|least)|no (?:more|less) than (\d+) for me|"
        r"it (?:is worth|costs me) (\d+)"
        r"|honestly , (?:below )?(\d+) (?:is all|i lose)|\bi (\d+) :|\d+ and (\d+) , so"
        r"|between \d+ and (\d+) is|my (\d+) , then"
    )
    stated = 0
    for dialogue in CORPUS:
        for side, text in utterances(dialogue):
            if match := limit.search(text):
                stated += 1
                own = re.findall(r"\d+", dialogue.scenario.private_text[side])[0]
                assert [n for n in match.groups() if n] == [own], text
    assert stated > 0.7 * len(CORPUS)


def test_only_the_hasty_offer_or_take_a_loss() -> None:
    losses = 0
    for dialogue in CORPUS:
        if dialogue.outcome.agreed:
            for side, gained in enumerate(dialogue.outcome.scores):
                assert gained >= 0 or dialogue.temperaments[side] == "hasty"
                losses += gained < 0
    assert losses > 0.05 * len(CORPUS)


def test_the_mixture_leaves_much_to_gain_and_two_honest_sides_nothing() -> None:
    found = GAME.summarise([d.outcome for d in CORPUS])
    assert 0.7 < found["efficiency"] < 0.9
    assert 0.7 < found["right_walks"] < 0.9
    assert 0.7 < found["nash_ratio"] < 0.9
    assert found["wrong_deals"] > 0.1
    assert found["failure_no_close"] > 0.02
    assert found["failure_mismatch"] > 0
    zone_walks = [d for d in CORPUS if d.outcome.failure == "walk_away" and d.outcome.metrics["zone"]]
    assert len(zone_walks) > 0.01 * len(CORPUS)
    refusals = sum(text.startswith(("no ,", "sorry , no")) for d in CORPUS for _, text in utterances(d))
    assert refusals > 0.3 * len(CORPUS)
    honest = GAME.summarise([d.outcome for d in CORPUS if d.temperaments == ("open", "open")])
    assert honest["dialogues"] > 0.15 * len(CORPUS)
    assert honest["efficiency"] == honest["right_walks"] == 1.0
    assert honest["nash_ratio"] > 0.98


def test_nobody_peeks() -> None:
    """With another limit on the other side, a side's words stay the same while what it hears does."""
    rng = random.Random(2)
    compared = changed = 0
    for _ in range(1000):
        one = rng.choice(GAME.splits["train"])
        told = GAME.scenario(one, "train").private_text[0]
        twins = [h for h in CONTEXTS if GAME.scenario(h, "train").private_text[0] == told]
        other, seed = rng.choice(twins), rng.getrandbits(32)
        held = [scripted_dialogue(GAME, GAME.scenario(h, "train"), random.Random(seed)) for h in (one, other)]
        for (side, text), (_, twin) in zip(*map(utterances, held), strict=False):
            if side == 1 and text != twin:
                changed += 1
                break
            if side == 0:
                compared += 1
                assert text == twin
    assert compared > 500
    assert changed > 300, "the twins hardly differ: nothing was tested"


def test_an_honest_side_walks_away_once_it_knows_better() -> None:
    for theirs, leaves in ((14, True), (12, True), (10, False)):
        side = Haggler((11,), "open", random.Random(0), buys=True)
        side.hear(Act(reveal=(theirs,), take=(9,)))
        assert side.act().leave == leaves
        assert (side.state() == "walk away") == leaves or side.agreed


def test_in_english_a_word_beside_both_limits_says_which_way_it_goes() -> None:
    """The seller's number first, whoever speaks; then how they compare, and only now do the sentences that
    name a price part from those that part.
    """
    settings = SelectionSettings(name="price", telling="english")
    game: Any = kind_of(settings)(settings)
    words = english.words_of(FILES)
    kinds = [f"{who}_{kind}" for who in ("buyer", "seller") for kind in ("compare", "apart")]
    pairs = [zip(words[meet], words[part], strict=True) for meet, part in (kinds[:2], kinds[2:])]
    for meet, part in itertools.chain(*pairs):
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(meet, part, strict=False))
        alike = "".join(one for one, _ in equal)
        assert set(re.findall(r"\{\d\}", alike)) == {"{1}", "{2}"}, (meet, part)
    slot = re.compile(r"\\\{\d\\\}")
    forms = [(kind, slot.sub(r"(\\d+)", re.escape(form))) for kind in kinds for form in words[kind]]
    rng, heard = random.Random(5), Counter[bool]()
    for _ in range(400):
        talk = scripted_dialogue(game, game.sample(rng, "train"), rng, {"open": 1.0})
        haggle = talk.scenario.data
        for _, text, _ in talk.turns:
            for kind, form in forms:
                if match := re.search(form, text):
                    least, most, *price = map(int, match.groups())
                    assert (least, most) == (haggle.least, haggle.most), text
                    assert kind.endswith("compare") == (haggle.zone > 0), text
                    assert all(least < n < most for n in price), text
                    heard[haggle.zone > 0] += 1
        assert talk.outcome.metrics["right"], talk.turns
    assert min(heard.values()) > 100


def test_the_word_that_decides_counts_more_in_imitation() -> None:
    """Its tokens, in the words of whoever said it, and no others."""
    settings = SelectionSettings(name="price", telling="english")
    game: Any = kind_of(settings)(settings)
    dialogues = corpus(game, 80, seed=1, names=["open"])
    tokenizer = train_tokenizer([text for one in dialogues for _, text, _ in one.turns], 400)
    found = Counter[str]()
    for i, dialogue in enumerate(dialogues):
        plain = demonstration_rows(dialogue, tokenizer, i, final_weight=4.0)
        rows = demonstration_rows(dialogue, tokenizer, i, final_weight=4.0, decisive_weight=16.0)
        for side, (row, even) in enumerate(zip(rows, plain, strict=True)):
            assert row.weights is not None
            assert even.weights is not None
            assert row.token_ids == even.token_ids
            at = [n for n, weight in enumerate(row.weights) if weight == 16]
            assert all(row.loss_mask[n] for n in at)
            assert [w for n, w in enumerate(row.weights) if n not in at] == [
                w for n, w in enumerate(even.weights) if n not in at
            ]
            marked = tokenizer.decode([row.token_ids[n] for n in at])
            said = [text for who, text, kind in dialogue.turns if who == side and kind == "utterance"]
            compared = [text for text in said if len(re.findall(r"\d+", text)) > 1]
            assert bool(marked) == bool(compared), (marked, said)
            found[marked.strip()] += bool(marked)
    ways = {"enough", "room", "will do", "fine", "a price", "can meet", "works", "can be done"}
    ways |= {
        "too little",
        "no room",
        "won't do",
        "a pity",
        "no price",
        "can't meet",
        "falls short",
        "can't be done",
    }
    assert len(found & Counter(ways)) > 10, found


@pytest.mark.parametrize("name", ["deal", "priorities"])
def test_who_gets_an_item_is_decided_where_its_values_stand(name: str) -> None:
    game = build_game(load_config(name, ["game.telling=english"]))
    decided = Counter[str]()
    for one in corpus(game, 100, seed=2, names=["open"]):
        for (_, text, _), spans in zip(one.turns, one.decisive, strict=True):
            items = len(re.findall(r"\d+ (?:to|for) (?:Ann|Ben) and \d+ (?:to|for) (?:Ann|Ben)", text))
            assert len(spans) == items, text
            decided.update(text[start:end] for start, end in spans)
    assert min(decided["Ann"], decided["Ben"]) > 50
    assert set(decided) == {"Ann", "Ben"}


def test_without_marked_words_none_can_count_more() -> None:
    config = load_config("price", ["imitation.decisive_weight=2"])
    with pytest.raises(ValueError, match=r"imitation.decisive_weight = 2.0: accepted is 1, for no word"):
        build_corpus(config, build_game(config))
