"""Scripted partners: what they say is what is understood, nothing that is said breaks one, none takes what
its character forbids, two of them agree, and in the arena their words follow from the talk as text alone.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo.advantage import RunningBaseline
from duologue.grpo.config import load_config
from duologue.grpo.rows import grpo_rows
from duologue.grpo.sections import GrpoSection
from duologue.model.tokenizer import Tokenizer, train_tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.games import deal_words, price_words
from duologue.rollout.games.catalogue import GAMES, MEANINGS, SIDES, characters, corpus, partners
from duologue.rollout.games.deal import ITEMS
from duologue.rollout.games.deal_words import Language
from duologue.rollout.games.game import Scenario
from duologue.rollout.games.priorities import Camper
from duologue.rollout.games.scripted import Act, ScriptedDialogue, Side, meet, phrases
from duologue.rollout.games.selection import CLOSE, SelectionGame
from duologue.rollout.selfplay.arena import Arena
from duologue.rollout.selfplay.dialogue import POLICY, Group, assign_rewards
from duologue.rollout.selfplay.partners import ScriptedSpeaker
from duologue.rollout.selfplay.rules import Rules
from duologue.rollout.selfplay.speakers import Opponent
from test_deal_scripts import COMPARED, VALUES, read_offer
from tiny import decoder

ROUNDS = 5
NAMES = tuple(SIDES)
CHARACTERS = ("conceder", "boulware", "tit_for_tat", "honest", "liar", "walker")
every_game = pytest.mark.parametrize("name", NAMES)


@cache
def game_of(name: str) -> SelectionGame:
    game = GAMES[name]()
    assert isinstance(game, SelectionGame)
    return game


@cache
def spoken(name: str) -> tuple[str, ...]:
    """What scripts and characters say."""
    held = corpus(game_of(name), 150, 1) + corpus(game_of(name), 150, 2, CHARACTERS)
    return tuple(text for d in held for _, text, kind in d.turns if kind == "utterance")


def make(name: str, who: str, scenario: Scenario, role: int, seed: int) -> Side:
    side: Side = SIDES[name](game_of(name), scenario, role, who, random.Random(seed))
    side.utterances = 2 * ROUNDS
    return side


def test_every_game_with_rules_has_them_all() -> None:
    for name in NAMES:
        assert characters(name) == CHARACTERS
        assert set(CHARACTERS) < set(partners(name))
    page = (Path(__file__).parent.parent / "docs/games.md").read_text("utf-8")
    assert all(f"| `{who}` | {meaning}" in page for who, meaning in MEANINGS.items())
    assert characters("dilemma") == partners("dilemma") == ()


# ---- words -------------------------------------------------------------------------------------------------


def any_act(rng: random.Random, vector: Callable[[], tuple[int, ...]], offer: Callable[[], Any]) -> Act:
    """One of everything that can be said: an answer to an offer, or what goes with another or none."""
    said = {name: rng.random() < 0.4 for name in ("refuse", "reveal", "take", "ask", "leave")}
    if rng.random() < 0.2:
        return Act(accept=True, close=rng.random() < 0.5)
    if rng.random() < 0.1:
        return rng.choice([Act(confirm=True, close=True), Act(close=True), Act(confirm=True)])
    act = Act(
        refuse=said["refuse"],
        reveal=vector() if said["reveal"] else None,
        take=offer() if said["take"] else None,
        best=said["take"] and rng.random() < 0.4,
        against=vector() if said["reveal"] and said["take"] and rng.random() < 0.7 else None,
        ask=said["ask"],
        leave=said["leave"],
        close=said["leave"] and rng.random() < 0.5,
    )
    return Act(ask=True) if act == Act() else act


def same(meant: Act, read: Act) -> bool:
    """That an offer is the best for both is said by some forms and not by others, and nobody goes by it."""
    if read.best and not (meant.best or meant.against):
        return False
    return replace(meant, best=False) == replace(read, best=False)


@pytest.mark.parametrize("counts", [(1, 2, 3), (4, 1, 1), (2, 2, 1), (3, 1, 2, 2), (1, 4, 2, 2, 3)])
def test_an_utterance_of_deal_is_understood_as_it_was_meant(counts: tuple[int, ...]) -> None:
    rng, language = random.Random(str(counts)), Language()
    for _ in range(1500):
        act = any_act(
            rng,
            lambda: tuple(rng.randrange(11) for _ in ITEMS[: len(counts)]),
            lambda: tuple(rng.randint(0, c) for c in counts),
        )
        if not (act.close or act.accept or act.confirm) and rng.random() < 0.3:
            hint = {rng.choice(["want", "spare"]): rng.randrange(len(counts))}
            act = Act(**{f: getattr(act, f) for f in Act.__slots__} | hint)
        text = deal_words.utter(act, counts, language, rng, told=rng.random() < 0.5, left=rng.random() < 0.5)
        assert same(act, deal_words.understood(text, counts, language)), text


def test_an_utterance_of_priorities_is_understood_as_it_was_meant() -> None:
    rng, language, ranks = random.Random(3), Camper.language, [5, 4, 3]
    for _ in range(3000):
        act = any_act(
            rng, lambda: tuple(rng.sample(ranks, 3)), lambda: tuple(rng.randint(0, 3) for _ in range(3))
        )
        text = deal_words.utter(act, (3, 3, 3), language, rng, told=rng.random() < 0.5, left=False)
        assert same(act, deal_words.understood(text, (3, 3, 3), language)), text


@pytest.mark.parametrize("buys", [True, False])
def test_an_utterance_of_price_is_understood_as_it_was_meant(buys: bool) -> None:
    rng = random.Random(buys)
    for _ in range(3000):
        act = any_act(rng, lambda: (rng.randrange(100),), lambda: (rng.randrange(100),))
        text = price_words.utter(act, buys, rng)
        assert same(act, price_words.understood(text, buys)), text


def test_offers_and_values_are_read_as_another_reader_reads_them() -> None:
    """The patterns of test_deal_scripts were written by hand, from the words alone."""
    offers = values = 0
    for held in (corpus(game_of("deal"), 400, 5), corpus(game_of("deal"), 400, 6, CHARACTERS)):
        for dialogue in held:
            counts = dialogue.scenario.data.counts
            for _, text, kind in dialogue.turns:
                if kind == "final":
                    continue
                act = deal_words.understood(text, counts, Language())
                read = read_offer(text, counts)
                divided = re.search(r" to \d+ , \d", text)  # which the scripts of that test never do
                assert divided or act.take == (read[0] if read else None), text
                offers += read is not None
                stated, compared = VALUES.search(text), COMPARED.findall(text)
                if stated:
                    assert act.reveal == tuple(map(int, stated.groups()))
                    values += 1
                if compared and not divided:
                    assert act.reveal == tuple(int(mine) for _, mine, _, _ in compared)
                    assert act.against == tuple(int(theirs) for _, _, theirs, _ in compared)
    assert offers > 600
    assert values > 300


def test_only_what_is_complete_and_adds_up_is_taken_as_an_offer() -> None:
    def read(text: str) -> Act:
        return deal_words.understood(text, (1, 2, 3), Language())

    whole = "i take 1 book and 1 hat , you take 1 hat and 3 balls ."
    assert read(whole).take == (1, 1, 0)
    assert read(whole.replace(" .", ".").replace(" ,", ",").title()).take == (1, 1, 0)
    assert read(f"hmm so well . {whole} no way").take == (1, 1, 0)
    assert read(f"maybe {whole}").take == (1, 1, 0)  # words too many, or too few before what counts
    assert read("here is book 1 , hat 3 , ball 1 . ask").reveal == (1, 3, 1)
    assert read("best 1 book for me , 2 hats for you , 3 balls for me .").take == (1, 0, 3)
    for broken in (
        whole[:-2],
        whole.replace("3 balls", "2 balls"),
        whole.replace("1 book", "2 books"),
        whole.replace(" and 3 balls", ""),
        "1 book for me , 2 hats for you .",
    ):
        assert read(broken).take is None, broken
    assert read("deal . " + whole) == read(whole)  # who makes an offer has not accepted the other's
    assert read(whole + " deal .") == read(whole)
    assert read("big deal .") == Act()
    assert read(
        "i get 1 book , you get 2 hats and 3 balls . i get nothing , you get the book and both hats and"
        " all 3 balls ."
    ).take == (0, 0, 0)  # the later one
    assert price_words.understood("i can pay 120 .", True) == Act()
    side = make("deal", "honest", game_of("deal").sample(random.Random(0), "train"), 0, 0)
    assert side.understand("to me book 9 , hat 9 , ball 9 .").reveal is None  # nobody has such values


def test_every_form_of_the_files_is_understood() -> None:
    """As the scripts mean it: each sentence of each kind, alone."""
    counts, kinds = (1, 2, 3), set()
    numbers = {
        "reveal": "book 1 , hat 2 , ball 3",
        "compare": "book 1 to 2 for me , hat 1 to 1 , 1 for me and 1 for you , ball 1 to 2 for you",
        "by_item": "1 book for me , 2 hats for you , 3 balls for me",
    }
    filled = numbers | {"also": numbers["reveal"], "joint": numbers["by_item"]}
    filled |= dict.fromkeys(("want", "spare", "reason"), "hats")
    for kind, forms in phrases("deal").items():
        for form in forms:
            text = form.format(filled.get(kind, "1 book"), "2 hats and 3 balls")
            act = deal_words.understood(f"{text} {CLOSE}", counts, Language())
            assert act.close
            assert kind == "hurry" or act != Act(close=True), text
            kinds.add(kind)
    for side, buys in (("buyer", True), ("seller", False)):
        for kind, forms in phrases("price").items():
            if kind.startswith(("buyer", "seller")) and not kind.startswith(side):
                continue
            for form in forms:
                assert price_words.understood(form.format(7, 8, 9), buys) != Act(), form
    assert kinds == set(phrases("deal"))


# ---- whatever is said --------------------------------------------------------------------------------------


def garbled(name: str, rng: random.Random) -> str:
    """Words of the game in no order, cut, shuffled or joined utterances, nothing, too much, other scripts."""
    real = rng.choice(spoken(name)).split()
    kind = rng.randrange(9)
    if kind == 0:
        words = [
            word for _ in range(rng.randint(1, 12)) for word in [rng.choice(rng.choice(spoken(name)).split())]
        ]
    elif kind == 1:
        words = real[: rng.randint(0, len(real))]
    elif kind == 2:
        words = rng.sample(real, len(real))
    elif kind == 3:
        words = real + rng.choice(spoken(name)).split()
    elif kind == 4:
        words = [
            rng.choice(["", " ", ".", "? . ?", ", , :", CLOSE, "\n\t", "0" * 40, "-3", "{0}", "(?P<f0>"])
        ]
    elif kind == 5:
        words = real * rng.randint(20, 60)
    elif kind == 6:
        words = [
            "".join(chr(rng.choice([0x4E00, 0x1F600, 0x0627, 0x0300, 0, 0xD7])) for _ in range(9)),
            *real,
        ]
    else:
        words = real
    if rng.random() < 0.05:
        words = [*words, CLOSE]
    return " ".join(words)


def talk(name: str, who: str, seed: int, other: Callable[[random.Random], str]) -> tuple[Side, list[Any]]:
    """A partner in a talk with somebody who says anything: it, and what it took: the offer, its own turn and
    what it knew of the other's values.
    """
    rng, game = random.Random(f"{name} {who} {seed}"), game_of(name)
    side = make(name, who, game.sample(rng, "train"), seed % 2, seed)
    taken: list[Any] = []
    for n in range(2 * ROUNDS):
        if (n + seed) % 2 == 0:
            offer, turn, theirs = side.offer, side.spoken, side.theirs
            act = side.act()
            text = side.say(act)
            assert text
            assert text == " ".join(text.split())
            assert game.closes(text) == act.close
            assert side.understand(text) is not None
            if act.accept:
                taken.append((offer, turn, theirs))
        else:
            text = other(rng)
            side.hear(side.understand(text))
        if game.closes(text):
            break
    scenario = game.sample(random.Random(f"{name} {who} {seed}"), "train")
    assert game.can_state(scenario, side.state()) or side.state() == "walk away"
    return side, taken


@every_game
def test_nothing_that_is_said_breaks_one(name: str) -> None:
    heard = 0

    def anything(rng: random.Random) -> str:
        nonlocal heard
        heard += 1
        return garbled(name, rng)

    for seed in itertools.count():
        if heard > 3500:
            break
        for who in partners(name):
            talk(name, who, seed, anything)


def utility(name: str, side: Any, take: tuple[int, ...]) -> float:
    """By the rules of the games: points of all that there are, or the gain of the ten that are hoped for."""
    if name == "price":
        return (side.values[0] - take[0] if side.buys else take[0] - side.values[0]) / 10
    return sum(v * n for v, n in zip(side.values, take, strict=True)) / (10 if name == "deal" else 36)


LEAST = {"deal": 0.3, "price": 0.1, "priorities": 0.3}
BETA = {"conceder": 4.0, "boulware": 0.4, "honest": 1.0, "liar": 1.0, "walker": 1.0}


def polynomial(who: str, name: str, turn: int, turns: int) -> float:
    """The aspiration at an own turn: 1 - (1 - least) * (t / deadline) ** (1 / beta), Faratin et al. 1998."""
    least = LEAST[name] + 0.1 * (who == "walker")
    passed = min(1.0, turn / (2 if who == "walker" else turns - 1))
    return 1 - (1 - least) * passed ** (1 / BETA[who])


def best_for_both(side: Any, theirs: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Of `deal`, by trying everything: the largest joint score and of these the largest product."""
    takes = list(itertools.product(*(range(c + 1) for c in side.counts)))

    def points(take: tuple[int, ...]) -> tuple[int, int]:
        mine = sum(v * n for v, n in zip(side.values, take, strict=True))
        yours = sum(v * (c - n) for v, c, n in zip(theirs, side.counts, take, strict=True))
        return mine + yours, mine * yours

    best = max(map(points, takes))
    return {take for take in takes if points(take) == best}


@every_game
@pytest.mark.parametrize("who", CHARACTERS)
def test_none_takes_what_its_character_forbids(name: str, who: str) -> None:
    """Whatever the other says: complete offers of any kind, lies, acceptances of what was never offered."""

    def hostile(rng: random.Random) -> str:
        return rng.choice(spoken(name)) if rng.random() < 0.85 else garbled(name, rng)

    accepted = settled = 0
    for seed in range(250):
        side, taken = talk(name, who, seed, hostile)
        least = LEAST[name] + 0.1 * (who == "walker")
        for offer, turn, theirs in taken:
            accepted += 1
            worth = utility(name, side, offer)
            if who == "tit_for_tat":
                assert worth >= least - 1e-9
            elif who in ("honest", "liar") and theirs is not None:
                floor = 0.0 if who == "honest" else least
                assert worth >= floor - 1e-9
                if who == "honest" and name == "deal":
                    ideal = min(utility(name, side, take) for take in best_for_both(side, theirs))
                    assert worth >= min(ideal, polynomial(who, name, turn, ROUNDS)) - 1e-9
            else:
                assert worth >= polynomial(who, name, turn, ROUNDS) - 1e-9
        if side.agreed is not None:
            settled += 1
            assert name != "price" or utility(name, side, side.agreed) >= 0
            assert who == "honest" or utility(name, side, side.agreed) >= least - 1e-9
    assert accepted > 5
    assert settled > 5


@every_game
def test_a_close_without_a_word_takes_the_offer_that_stands(name: str) -> None:
    """Its own, or the other's if that is good enough; an offer that is not is not taken by closing on it."""
    scenario = PRICE_SCENARIO if name == "price" else game_of(name).sample(random.Random(1), "train")
    side: Any = make(name, "boulware", scenario, 0, 1)
    offer = side.act().take
    side.hear(side.understand(CLOSE))
    assert side.agreed == offer
    side = make(name, "boulware", scenario, 0, 1)
    side.act()
    side.hear(Act(take=(21,) if name == "price" else side.counts, close=True))  # all for the other
    assert side.agreed is None


def test_tit_for_tat_gives_what_it_is_given() -> None:
    """Priced in its own gains: after two offers it has come down by what they rose, and by its goodwill."""
    for rise in range(4):
        side: Any = make("price", "tit_for_tat", PRICE_SCENARIO, 0, 1)
        offers = []
        for price in (6, 6 + rise):
            act = side.act()
            offers.append(act.take[0])
            side.hear(Act(take=(price,)))
        offers.append(side.act().take[0])
        assert offers == [30, 28, 28 - rise]


PRICE_SCENARIO = game_of("price").scenario(
    next(
        h for hs in game_of("price").splits.values() for h in hs if (h.most, h.least, h.buyer) == (24, 20, 1)
    ),
    "train",
)


# ---- with each other ---------------------------------------------------------------------------------------


def between(name: str, one: str, other: str, n: int, split: str = "heldout") -> list[ScriptedDialogue]:
    rng, game = random.Random(f"{one} {other}"), game_of(name)
    held = []
    for _ in range(n):
        scenario = game.sample(rng, split)
        side = partial(SIDES[name], game, scenario)
        held.append(meet(game, scenario, (one, other), rng, side, 2 * ROUNDS))
    return held


def floor(name: str, pair: set[str]) -> float:
    """How often two agree at least. Who walks away soon meets few who wait for the deadline; a lie about a
    limit hides some of the zone.
    """
    if pair == {"walker", "boulware"}:
        return {"deal": 0.5, "price": 0.05, "priorities": 0.25}[name]
    if name == "price" and pair & {"walker"}:
        return 0.2 if "liar" in pair else 0.3
    if name == "price":
        return 0.6
    return 0.65


@every_game
def test_two_of_them_agree_on_a_fair_share_of_contexts(name: str) -> None:
    for pair in itertools.combinations_with_replacement(CHARACTERS, 2):
        agreed = game_of(name).summarise([d.outcome for d in between(name, *pair, 60)])["agreement"]
        assert agreed >= floor(name, set(pair)), pair
    if name == "price":
        for pair in itertools.combinations_with_replacement(CHARACTERS, 2):
            found = game_of(name).summarise([d.outcome for d in between(name, *pair, 30)])
            assert found["wrong_deals"] == 0.0
            assert found["right_walks"] == 1.0


def test_characters_are_what_they_are_called() -> None:
    """Against the same conceder who waits gets more than who concedes, and who lies more than who is honest
    with an honest one; two honest sides waste nothing.
    """

    def score(one: str, other: str) -> float:
        return sum(d.outcome.scores[0] for d in between("priorities", one, other, 120)) / 120

    assert score("boulware", "conceder") > score("conceder", "conceder") + 2
    assert score("liar", "conceder") > score("honest", "conceder") + 1
    both = game_of("deal").summarise([d.outcome for d in between("deal", "honest", "honest", 120)])
    assert both["agreement"] == both["pareto"] == 1.0


@every_game
def test_who_is_honest_states_its_values_and_who_lies_never(name: str) -> None:
    stated = {"honest": 0, "liar": 0}
    for dialogue in between(name, "honest", "liar", 60, "train"):
        reader = [make(name, "honest", dialogue.scenario, role, 0) for role in (0, 1)]
        for role, text, kind in dialogue.turns:
            act = Act() if kind == "final" else reader[1 - role].understand(text)
            if act.reveal is None:
                continue
            who = ("honest", "liar")[role]
            stated[who] += 1
            assert (act.reveal == reader[role].values) == (who == "honest"), text
    assert min(stated.values()) > 40


@every_game
def test_a_corpus_can_be_made_of_characters(name: str) -> None:
    held = corpus(game_of(name), 60, 3, ("honest", "honest", "boulware"))
    assert [d.turns for d in held] == [
        d.turns for d in corpus(game_of(name), 60, 3, ("honest", "honest", "boulware"))
    ]
    names = [who for d in held for who in d.temperaments]
    assert set(names) == {"honest", "boulware"}
    assert 0.5 < names.count("honest") / len(names) < 0.85


def test_a_setting_names_them() -> None:
    config = load_config("price", ['imitation.characters=["honest", "walker"]'])
    assert config.imitation.characters == ("honest", "walker")
    with pytest.raises(ValueError, match=r"imitation\.characters = .*accepted is some of conceder, .*hasty"):
        load_config("price", ['imitation.characters=["splitter"]'])
    with pytest.raises(ValueError, match="dilemmas, for which there are no scripts"):
        load_config("collective-agency", ['imitation.characters=["honest"]'])


# ---- in the arena ------------------------------------------------------------------------------------------


@cache
def tokenizer_of(name: str) -> Tokenizer:
    held = corpus(game_of(name), 200, 0)
    told = [text for d in held for text in d.scenario.private_text]
    return train_tokenizer([*told, *(text for d in held for _, text, _ in d.turns)], 400)


def facts(groups: list[Group]) -> list[Any]:
    return [[(t.role, t.kind, t.text, t.token_ids) for t in d.turns] for g in groups for d in g.dialogues]


@every_game
def test_partners_of_all_kinds_speak_beside_policies(name: str) -> None:
    """Many characters and a second engine in one call; whoever is played beside them changes no word, and
    nothing that they say is trained.
    """
    game, tokenizer = game_of(name), tokenizer_of(name)
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 700}
    policy, other = decoder(0, **shape), decoder(1, **shape)
    engine, beside = Engine(policy, cache_tokens=16384), Engine(other, cache_tokens=16384)
    arena = Arena(engine, tokenizer, game, Rules(max_rounds=3, max_tokens_per_turn=40))
    rng = random.Random(2)
    names = [*CHARACTERS, partners(name)[-1]]
    opponents: list[Opponent | None] = [
        Opponent(role=i % 2, name=f"scripted:{who}", character=who) for i, who in enumerate(names)
    ]
    opponents += [None, Opponent(role=1, name="other", engine=beside)]
    scenarios = [game.sample(rng, "train") for _ in opponents]
    groups = arena.play(scenarios, group_size=2, seed=9, opponents=opponents)
    assert [engine.pool.n_free, beside.pool.n_free] == [engine.pool.n_pages, beside.pool.n_pages]
    alone = [
        group
        for n in range(len(opponents))
        for group in arena.play(
            scenarios[n : n + 1], group_size=2, seed=9, opponents=opponents[n : n + 1], first_group=n
        )
    ]
    assert facts(alone) == facts(groups)
    ends = set(arena.contexts.chat.stop_token_ids)
    for group, opponent in zip(groups, opponents, strict=True):
        for d in group.dialogues:
            if opponent is None or not opponent.character:
                continue
            assert d.players[opponent.role] == opponent.name
            assert d.players[1 - opponent.role] == POLICY
            said = [turn for turn in d.turns if turn.role == opponent.role]
            assert said
            assert not any(d.views[opponent.role].kinds)
            for turn in said:
                assert turn.logprobs is None
                assert turn.text
                assert turn.token_ids[-1] in ends
                assert tokenizer.encode(turn.text) == turn.token_ids[:-1]
    assign_rewards(game, [d for group in groups for d in group.dialogues])
    rows, _ = grpo_rows(groups, GrpoSection(), RunningBaseline())
    assert len(rows) == 2 * (2 + len(opponents) - 1)


@every_game
def test_a_word_follows_from_the_talk_as_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A speaker that was not there, and was told another talk before, says the same at every turn."""
    game, tokenizer = game_of(name), tokenizer_of(name)
    rules, rng = Rules(max_rounds=ROUNDS), random.Random(4)
    asked: list[Any] = []
    heard = ScriptedSpeaker.ask
    monkeypatch.setattr(
        ScriptedSpeaker, "ask", lambda self, turn: (asked.append((self, turn)), heard(self, turn))
    )
    for who in partners(name):
        arena = Arena(ScriptedSpeaker(game, tokenizer, ROUNDS, "open"), tokenizer, game, rules)
        opponents = [Opponent(role=i % 2, name=who, character=who) for i in range(4)]
        arena.play([game.sample(rng, "train") for _ in range(4)], group_size=1, seed=1, opponents=opponents)
    rng.shuffle(asked)
    for speaker, turn in asked:
        fresh = ScriptedSpeaker(game, tokenizer, ROUNDS, speaker.who.removeprefix("scripted:"))
        (answer,) = [c for _, c in [*answers(fresh, turn)]]
        assert tokenizer.decode(answer.token_ids).strip() == speaker.words(turn)
    kinds = {turn.kind for _, turn in asked}
    assert len(kinds) == 2
    assert len(asked) > 100


def answers(speaker: ScriptedSpeaker, turn: Any) -> list[Any]:
    speaker._asked.append(turn)
    assert speaker.busy
    found = speaker.answered(wait=True)
    assert not speaker.busy
    return found


def test_a_turn_is_cut_at_its_limit() -> None:
    game, tokenizer = game_of("deal"), tokenizer_of("deal")
    speaker = ScriptedSpeaker(game, tokenizer, 2, "honest")
    arena = Arena(speaker, tokenizer, game, Rules(max_rounds=2, max_tokens_per_turn=6, max_tokens_final=4))
    (group,) = arena.play([game.sample(random.Random(0), "train")], group_size=2, seed=0)
    for dialogue in group.dialogues:
        assert all(0 < len(turn.token_ids) <= 6 for turn in dialogue.turns)
        assert dialogue.outcome is not None


def test_a_character_that_is_none_gets_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"character 'hones' in the game deal: accepted is one of conceder, "
    ):
        ScriptedSpeaker(game_of("deal"), tokenizer_of("deal"), 5, "hones")
    with pytest.raises(ValueError, match="accepted is none: the game has no scripts"):
        ScriptedSpeaker(GAMES["dilemma"](), tokenizer_of("deal"), 5, "honest")
