"""The English telling of deal, price and priorities: prompts, final statements, and those who speak it."""

# ruff: noqa: E501, PT018 - tables of sentences

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import threading
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo import partners as players
from duologue.grpo import talk_stats
from duologue.grpo.cli import main
from duologue.grpo.config import from_dict, load_config
from duologue.grpo.console import Progress
from duologue.grpo.run_dir import RunDir
from duologue.grpo.trainer import Trainer
from duologue.grpo.unsaid import kept_of, knows_english, unsaid
from duologue.rollout.games import catalogue, english
from duologue.rollout.games.catalogue import SIDES, characters, kind_in, kind_of, partners
from duologue.rollout.games.deal import Deal, DealSettings
from duologue.rollout.games.finals import Unread
from duologue.rollout.games.game import Game
from duologue.rollout.games.scripted import Act
from duologue.rollout.games.selection import SelectionSettings
from tiny import TINY_DEAL, dialogues, dying, lines, selfplay, trained

UNHEARD = {  # kinds that two scripts rarely or never have a reason for
    "deal": ("again", "hurry"),
    "price": ("again", "hurry", "bye"),
    "priorities": ("again", "hurry", "bye", "spare"),
}
GAMES = ("deal", "price", "priorities")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FILES = {
    "deal": ("english", "deal_english"),
    "price": ("english", "price_english"),
    "priorities": ("english", "deal_english", "priorities_english"),
}


def made(name: str, telling: str = "english") -> Any:
    settings = DealSettings if name == "deal" else SelectionSettings
    chosen = settings(name=name, telling=telling)
    return kind_of(chosen)(chosen)


@pytest.mark.parametrize("name", GAMES)
def test_a_game_has_at_least_two_hundred_forms_of_sentences(name: str) -> None:
    never = {*UNHEARD[name]} - {"again", "hurry"}
    forms = [
        form for kind, said in english.words_of(FILES[name]).items() if kind not in never for form in said
    ]
    assert len({re.sub(r"\W", "", english.normal(form)) for form in forms}) >= 200
    assert all(re.fullmatch(r"[A-Z{][^.?!]*[.?!]", form) for form in forms)  # one sentence each


@pytest.mark.parametrize("name", GAMES)
def test_what_is_said_is_understood_as_it_was_meant(name: str) -> None:
    """Every form is said in these talks, and the other side hears the act that was said."""
    game, rng, said = made(name), random.Random(1), set()
    for _ in range(500):
        scenario = game.sample(rng, "train")
        one, other = (
            SIDES[name](game, scenario, role, rng.choice(partners(name)), random.Random(rng.random()))
            for role in (0, 1)
        )
        for _ in range(7):
            act = one.act()
            text = one.say(act)
            said.add(text)
            heard = other.understand(text)
            said_again = {"take": one.agreed} if act.accept else {}
            act = replace(act, **said_again)
            for key in ("accept", "confirm", "refuse", "want", "spare", "take", "leave", "close"):
                assert getattr(heard, key) == getattr(act, key), (text, act, heard)
            stated = act.reveal if name == "price" or act.take is None else heard.reveal
            assert heard.reveal == stated and stated in (None, act.reveal), text
            lost = one.heard > 0 and one.last == Act() and not act.close and not act.accept
            assert heard.ask == (act.ask or lost), (text, act)
            other.hear(heard)
            one, other = other, one
    spelled = {english.normal(sentence) for text in said for sentence in re.findall("[^.?!]+[.?!]", text)}
    for kind, forms in english.words_of(FILES[name]).items():
        plain = [re.escape(english.normal(form)) for form in forms]
        patterns = [re.compile(re.sub(r"\\\{\d\\\}", ".+", form)) for form in plain]
        assert any(any(p.fullmatch(s) for s in spelled) for p in patterns) or kind in UNHEARD[name], kind


FINALS = {
    "deal": {
        "book 1 hat 0 ball 2": [
            "I get 1 book, 0 hats and 2 balls.", "i get 1 book 0 hat 2 ball", "**I get 1 book, 0 hats, and 2 balls.**",
            "Final: I take one book, no hats and two balls", "I'll take 2 balls, a book and zero hats.",
            "Final statement: book: 1, hat: 0, ball: 2", "book 1 hat 0 ball 2", "BOOKS 1, BALLS 2, HATS 0",
            "1 book - 0 hats – 2 balls", "I will keep  1  book ,  0 hats , 2 balls !", "My final statement is: I get 1 book, 0 hats, 2 balls.",
        ],
        "incomplete": ["I get 1 book and 2 balls.", "I take 2 hats"],
        "ambiguous": ["I get 1 book, 2 hats, 1 ball or 2 balls", "1 book, 1 book, 0 hats and 2 balls"],
        "malformed": [
            "", "I get the books.", "I get some books, 0 hats and 2 balls.", "You get 1 book, 0 hats and 2 balls.",
            "I get 1 book. You get 0 hats and 2 balls.", "I don't get 1 book, 0 hats and 2 balls.", "x" * 5000,
            "book 1 hat 0 2 ball", "1 book 0 hats 2 balls 3 pens", "I get 99999 books, 0 hats and 2 balls",
            "I get 1 book, 0 hats and -2 balls.", "I get 1.5 book, 0 hats and 2 balls.",
            "I get −1 books, 0 hats and 2 balls.", "I get 1½ books, 0 hats and 2 balls.",
        ],
    },
    "price": {
        "price 12": [
            "The price is 12.", "price 12", "Price: 12", "**The price is $12.**", "Final: the price is twelve", "12",
            "our agreed price is 12", "The final price is 12!",
        ],
        "walk away": ["I walk away.", "walk away", "I will walk away.", "Final: I'm walking away"],
        "ambiguous": ["The price is 12 or 13."],
        "malformed": [
            "The price is N.", "The price is not 12.", "The price is above 12.", "price 123", "", "I walk away at 12.",
            "The price is 12.5.", "The price is -12.", "1 2 or 1 2 walk", "The price is 12½.", "The price is −12.",
            "The price is –12.", "The price is - 12.", "Цена не 12", "The price is <12", "The price is 12+", "price 12²",
        ],
    },
    "priorities": {
        "food 1 water 3 firewood 0": [
            "I get 1 food, 3 water and 0 firewood.", "I get 1 package of food, 3 packages of water and no firewood.",
            "water 3, food 1, firewood 0",
        ],
        "walk away": ["I walk away."],
        "incomplete": ["I get 3 water."],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "meant", "text"),
    [
        (name, meant, text)
        for name, table in FINALS.items()
        for meant, texts in table.items()
        for text in texts
    ],
)
def test_finals_are_read_where_they_have_one_reading(name: str, meant: str, text: str) -> None:
    if name == "price" and text.startswith("1 2"):
        meant = "ambiguous"
    try:
        read = made(name).plain_final(text)
    except Unread as error:
        read = str(error)
    assert read == meant


@pytest.mark.parametrize("name", GAMES)
def test_failed_finals_are_counted_by_kind(name: str) -> None:
    game = made(name)
    scenario = game.sample(random.Random(0), "train")
    outcomes = [game.judge(scenario, (text, text)) for text in ("I get.", "?")]
    assert game.summarise(outcomes)["failure_malformed"] == 1
    kind = "ambiguous" if name == "price" else "incomplete"
    text = "12 or 13" if name == "price" else f"I get 1 {game.items[0]}"
    assert game.summarise([game.judge(scenario, (text, text))])[f"failure_{kind}"] == 1
    assert game.verdict({"agreed": False, "failure": kind}) != f"no deal: {kind}"


FREE = [
    ("I'll take 2 hats and the book and you take 1 ball", Act(take=(1, 2, 0))),
    ("ok I take all the hats and you can have everything else", Act(take=(0, 2, 0))),
    ("two hats for me, the rest for you", Act(take=(0, 2, 0))),
    ("my values: books 4, hats 2, balls 2", Act(reveal=(4, 2, 2))),
    ("Sure, sounds good!", Act(accept=True)),
    ("okay but I need the ball", Act()),
    ("I take 3 hats and you take 1 ball", Act()),  # there are 2
    ("Ann gets 1 book, 0 hats and 0 balls, and Ben gets 0 books, 2 hats and 1 ball.", Act(take=(0, 2, 1))),
    ("Ben keeps both hats, Ann takes the rest", Act(take=(0, 2, 0))),  # Ben speaks, Ann listens
    ("Ann gets 1 book and 1 hat, Ben gets the ball", Act()),  # of a hat nothing is said
    ("Side by side, a book is worth 2 to Ben and 4 to Ann, so Ann gets 1, a hat 2 to Ben and 2 to Ann, so Ann gets 2, "
     "and a ball 4 to Ben and 2 to Ann, so Ben gets 1.", Act(reveal=(2, 2, 4))),
    ("What do you want?", Act(ask=True)),
    ("No way.", Act(refuse=True)),
    ("Okay, I'd like the hats and the ball.", Act()),
    ("Yes, I need the ball.", Act()),
    ("I agree that the hats are more valuable to you.", Act()),
    ("Yes, please tell me your values.", Act()),
    ("Great, I'm glad we reached an agreement. [done]", Act(accept=True, close=True)),
    ("Excellent, deal.", Act()),
    ("I'll accept.", Act(accept=True)),
    ("We have a deal.", Act(accept=True)),
    ("I can't accept that you get the book and I get the hats and the ball.", Act(refuse=True)),
    ("It isn't fair that I get the book and you get the hats and the ball.", Act()),
    ("I would like 1 book, 2 hats and 1 ball.", Act()),  # a demand, no values
]  # fmt: skip
PRICES = [
    ("I'd sell it for $20.00.", Act(take=(20,))),
    ("I can do 12.50.", Act()),
    ("I would pay 1,200.", Act()),
    ("Let's find a price that works for the two of us.", Act()),
    ("This one is in great condition.", Act()),
    ("I have one question.", Act()),
    ("I can come down by 2.", Act()),
    ("Okay, let me think about it.", Act()),
    ("Sure, I would like to hear your offer.", Act()),
    ("Yes, we have an agreement.", Act(accept=True)),
    ("You have a deal! [done]", Act(accept=True, close=True)),
    ("I accept your offer of $15. [done]", Act(accept=True, take=(15,), close=True)),
]


@pytest.mark.parametrize(("text", "act"), FREE)
def test_free_variants_are_understood_where_they_are_clear(text: str, act: Act) -> None:
    game = made("deal")
    context = Deal((1, 2, 1), ((4, 2, 2), (2, 2, 4)))
    side = SIDES["deal"](game, game.scenario(context, "train"), 0, "honest", random.Random(0))
    assert side.understand(text) == act


@pytest.mark.parametrize(("text", "act"), PRICES)
def test_what_a_price_is_and_what_is_none(text: str, act: Act) -> None:
    game = made("price")
    scenario = game.sample(random.Random(0), "train")
    side = SIDES["price"](game, scenario, scenario.data.buyer, "honest", random.Random(0))
    assert side.understand(text) == act


@pytest.mark.parametrize(
    ("name", "offer", "text", "taken"),
    [
        ("price", (15,), "I accept your offer of $15. [done]", True),
        ("price", (15,), "I accept your offer of $16. [done]", False),
        ("deal", (1, 0, 1), "Deal! I get 0 books, 2 hats and 0 balls, you get 1 book, 0 hats and 1 ball. [done]", True),
        ("deal", (1, 0, 1), "Sounds fair. Then I take both hats and you take the rest. [done]", True),
        ("deal", (1, 0, 1), "Deal! I get 1 book, 2 hats and 0 balls, you get 0 books, 0 hats and 1 ball.", False),
        ("price", (12,), "Yes, I accept. So the price is 12. [done]", True),
        ("price", (12,), "Okay, deal. The price is 13, then.", False),
    ],
)  # fmt: skip
def test_an_acceptance_may_say_again_what_was_offered_and_nothing_else(
    name: str, offer: tuple[int, ...], text: str, taken: bool
) -> None:
    """Of another division it is an offer, which the listener may take or not."""
    game = made(name)
    if name == "deal":
        scenario = game.scenario(Deal((1, 2, 1), ((4, 2, 2), (2, 2, 4))), "train")
    else:
        scenario = game.sample(random.Random(0), "train")
    side = SIDES[name](game, scenario, 0, "honest", random.Random(0))
    side.offered = offer
    side.hear(side.understand(text))
    assert side.last.accept == taken
    assert (side.offer is None) == taken
    if taken:
        assert side.act().confirm
        assert side.agreed == offer


def garbled(rng: random.Random, words: list[str]) -> str:
    drawn = [rng.choice(words) for _ in range(rng.randrange(25))]
    return "".join(rng.choice((f"{word} ", word, f"{word}. ", f"{word}? ", "\x00é{0}")) for word in drawn)


@pytest.mark.parametrize("name", GAMES)
def test_nothing_that_is_said_breaks_a_negotiator_or_its_principles(name: str) -> None:
    """10,000 garbled utterances of each game; no offer below what a character takes is accepted."""
    game, rng = made(name), random.Random(4)
    forms = [form for forms in english.words_of(FILES[name]).values() for form in forms]
    words = [word for form in forms for word in form.split()] + [
        "0",
        "2",
        "17",
        "hats",
        "food",
        "book",
        "[done]",
    ]
    for n in range(2500):
        scenario, character = game.sample(rng, "train"), characters(name)[n % 6]
        side = SIDES[name](game, scenario, n % 2, character, random.Random(n))
        for _ in range(4):
            side.hear(side.understand(garbled(rng, words)))
            act = side.act()
            if act.accept:
                assert side.utility(side.agreed) >= min(
                    side.tactic.reservation(side), 0.0 if side.tactic.states else 9
                )
            assert side.say(act)
        game.plain_final(side.state())


@pytest.mark.parametrize("name", GAMES)
def test_two_agree_in_english_as_often_as_in_plain_words(name: str) -> None:
    shares = {}
    for telling in ("plain", "english"):
        game = made(name, telling)
        dialogues = catalogue.corpus(game, 500, 3, characters(name))
        shares[telling] = sum(d.outcome.agreed for d in dialogues) / 500
        assert not any(d.outcome.failure in ("malformed", "incomplete", "ambiguous") for d in dialogues)
    assert abs(shares["plain"] - shares["english"]) < 0.08 and shares["english"] > 0.5, shares


def test_turns_have_the_length_and_the_variety_of_talk() -> None:
    turns = [
        text
        for name in GAMES
        for dialogue in catalogue.corpus(made(name), 300, 0)
        for _, text, kind in dialogue.turns
        if kind == "utterance"
    ]
    lengths = [len(text.split()) for text in turns]
    assert 8 <= sum(lengths) / len(lengths) <= 22 and max(lengths) <= 90
    openings = [" ".join(text.split()[:2]) for text in turns]
    assert max(map(openings.count, set(openings))) < 0.06 * len(turns)


def test_the_telling_follows_the_checkpoint_and_older_runs_keep_theirs(tmp_path: Path) -> None:
    assert load_config("deal").value("game.telling") == "plain"
    assert load_config("price", ["model.path=x"]).value("game.telling") == "english"
    assert load_config("deal", ["model.path=x", "game.telling=plain"]).value("game.telling") == "plain"
    old = load_config("deal", ["model.path=x", "game.telling=plain"]).to_toml()
    path = tmp_path / "config.toml"
    path.write_text(old.replace('telling = "plain"\n', ""), "utf-8")
    assert from_dict({"model": {"path": "x"}}).value("game.telling") == "plain"
    assert load_config(str(path)).value("game.telling") == "plain"
    assert kept_of(tmp_path) == {"game.telling": "plain", "model.dtype": "float32"}
    assert load_config("deal", ["model.path=x"], kept_of(tmp_path)).value("game.telling") == "plain"
    said = ["model.path=x", "game.telling=english"]
    assert load_config("deal", said, kept_of(tmp_path)).value("game.telling") == "english"
    with pytest.raises(ValueError, match=r"game\.telling = 'dutch'"):
        load_config("deal", ["game.telling=dutch"])


def test_a_checkpoint_that_no_setting_names_is_told_what_it_knows(
    chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `eval` and `play`: a chat model in English, one from nothing plainly, in its run and out of it, and
    a run's checkpoint as the run was told."""
    chat = Path(shutil.copytree(chat_checkpoint, tmp_path / "model"))
    (chat / "chat_template.jinja").write_text(CHATML, "utf-8")
    run = tmp_path / "run"
    assert main(["train", "deal", *TINY_DEAL, "train.steps=0", "--run-dir", str(run)]) == 0
    plain = run / "checkpoints" / "warm_start"
    outside = tmp_path / "outside"
    assert main(["export", str(plain), str(outside)]) == 0
    settings = ["dialogue.max_rounds=1", "dialogue.max_tokens_final=80", "rollout.cache_tokens=32768"]
    for folder, told in ((chat, True), (plain, False), (run, False), (outside, False)):
        asked = ["deal", *(settings if told else TINY_DEAL)]
        measures = tmp_path / "measures.json"
        shared = ["eval.dialogues=2", "--json", str(measures)]
        assert main(["eval", str(folder), "--recipe", *asked, *shared]) == 0
        assert ("failure_incomplete" in json.loads(measures.read_text("utf-8"))) == told
        lines = tmp_path / "lines.jsonl"  # whoever comes first, the checkpoint decides
        words = ["eval", "scripted:honest", str(folder), "--recipe", *asked, "eval.dialogues=1"]
        assert main([*words, "--save-dialogues", str(lines)]) == 0
        assert ("You and another person" in lines.read_text("utf-8")) == told
        monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        capsys.readouterr()
        assert main(["play", str(folder), "--game", *asked]) == 0
        assert ("You and another person share out" in capsys.readouterr().out) == told
    for line, told in (('telling = "english"', True), ('telling = "plain"', False), ("", False)):
        toml = load_config("deal", [f"model.path={chat_checkpoint}"]).to_toml()
        (tmp_path / "config.toml").write_text(toml.replace('telling = "english"', line), "utf-8")
        assert knows_english(outside) == told
    (tmp_path / "config.toml").write_text("[game", "utf-8")
    assert not knows_english(outside) and unsaid("scripted:honest") == {}


def test_a_checkpoint_is_trained_in_english_and_goes_on_from_where_it_was(
    chat_checkpoint: Path, tmp_path: Path
) -> None:
    """Imitation and self-play with a scripted partner; a resumed run is the same bit for bit, and log-probs
    of the rollout are those of the update."""
    folder = Path(shutil.copytree(chat_checkpoint, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    settings = [
        f"model.path={folder}", "imitation.steps=1", "imitation.dialogues=20",
        "imitation.dialogues_per_step=2", "imitation.characters=[]", "grpo.group_size=2", "grpo.groups_per_step=2", "train.save_every=1",
        "dialogue.max_rounds=2", "dialogue.max_tokens_per_turn=12", "dialogue.max_tokens_final=80", "eval.dialogues=2",
        "eval.ability=false", "eval.partners=[]", "rollout.cache_tokens=32768", "opponent.kind=scripted:honest", "train.threads=1",
    ]  # fmt: skip
    whole, half = tmp_path / "whole", tmp_path / "half"
    config = load_config("deal", [*settings, "train.steps=2"])
    trained(whole, config)
    trained(half, load_config("deal", [*settings, "train.steps=1"]))
    Trainer(config, RunDir.resume(half, config.to_toml()), Progress(quiet=True), threading.Event()).run()
    killed = tmp_path / "killed"
    command = ["train", "deal", *settings, "train.steps=2", "--run-dir", str(killed)]
    assert subprocess.run([*dying(2), *command], capture_output=True, timeout=400).returncode == -9
    assert len(lines(killed)) == 2
    assert main([*command, "--resume"]) == 0
    for path in (half, killed):
        assert lines(path) == lines(whole)
        assert dialogues(path) == dialogues(whole)
    assert [row["mismatch"] for row in selfplay(whole)] == [0.0, 0.0]
    assert all(
        "Talk in short messages" in text for d in dialogues(whole) for text in d["scenario"]["private"]
    )
    spoken = [t for d in dialogues(whole) for t in d["turns"] if t["logprobs"] is None]
    assert spoken
    assert all(t["text"][0].isupper() for t in spoken)


def test_english_has_room_for_its_statements_where_nothing_is_said() -> None:
    config = load_config("deal", ["model.path=x"])
    assert config.dialogue.max_tokens_final == 32
    assert (
        load_config("deal", ["model.path=x", "dialogue.max_tokens_final=20"]).dialogue.max_tokens_final == 20
    )
    again = load_config("deal", ["model.path=x", "game.telling=english"])
    assert again.to_toml() == config.to_toml()
    assert load_config("deal").dialogue == load_config("deal", ["game.telling=plain"]).dialogue


def test_a_run_is_described_in_the_telling_that_it_had() -> None:
    """Report, page and `watch` know from config.toml that a failure is one of English statements."""
    for name in GAMES:
        section = load_config(name, ["game.telling=english"]).to_toml()
        kind = kind_in(tomllib.loads(section)["game"])
        assert kind is kind_of(load_config(name, ["game.telling=english"]).game)
        for failure in ("incomplete", "ambiguous"):
            assert kind.failure_in_words(failure) != failure
            assert failure in talk_stats.MALFORMED
    assert kind_in({"name": "gone"}) is Game


def test_servers_of_a_matrix_are_asked_where_each_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(players, "build_server", lambda config, *_: asked.append(config.opponent.url))
    places = ["http://127.0.0.1:8001/v1", "http://127.0.0.1:8002/v1"]
    config = load_config("deal", ["opponent.kind=endpoint", f"opponent.url={places[0]}"])
    tokenizer: Any = None
    for place in places:
        player = players.load_player(place, config, made("deal"), Path("nowhere"))
        assert player.speaker is not None
        player.speaker(tokenizer)
    assert asked == places
