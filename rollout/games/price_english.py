"""`price` told in English: prompts, final statements, and how scripted negotiators speak."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from duologue.rollout.games import english
from duologue.rollout.games.english import pick
from duologue.rollout.games.finals import KINDS, ReadFinals, Unread
from duologue.rollout.games.price import Haggle, PriceGame
from duologue.rollout.games.scripted import Act

FILES = ("english", "price_english")
ACCEPTED = re.compile(
    r"(?:(?:yes|ok|okay|great|sure) )?(?:i|ill|i can) (?:accept|agree to) "
    r"(?:the|your) (?:offer|price|proposal)(?: of)? (\d{1,2})"
)
MOVES = re.compile(r"\bby \d+\b|\b\d+ (?:more|less|lower|higher)\b")
LIMIT = re.compile(r"\b(?:limit|most|least|maximum|minimum|max|min|budget|more than|less than|above|below)\b")
BOTH = ("middle", "recap", "ask", *english.SHARED)  # kinds of sentences of either side


class PriceWords:
    """Of buyers and sellers."""

    def utter(self, side: Any, act: Act) -> str:
        words, rng, who = english.words_of(FILES), side.rng, "buyer" if side.buys else "seller"
        named = (side.agreed if act.accept else act.take, act.against, act.reveal)
        price, theirs, own = (vector[0] if vector else 0 for vector in named)
        fill = [str(number) for number in (price, theirs, own)]
        bid = f"{who}_compare" if act.against else "middle" if act.best else f"{who}_bid"
        parting = f"{who}_apart" if act.against else "bye" if side.last.leave else "leave"
        lost = side.heard > 0 and side.last == Act() and not act.accept
        parts = (
            (act.accept, "agree"),
            (act.accept and side.agreed, "recap"),
            (act.confirm, "confirm"),
            (lost and not act.close, "again"),
            (act.refuse, f"{who}_refuse"),
            (act.reveal and not act.against, f"{who}_limit"),
            (act.take, bid),
            (act.ask and not lost, "ask"),
            (act.leave, parting),
            (act == Act(close=True), "hurry"),
        )
        said = [pick(words, kind, rng, *fill) for wanted, kind in parts if wanted]
        return " ".join([*said, english.DONE] if act.close else said)

    def understood(self, side: Any, text: str) -> Act:
        who = "seller" if side.buys else "buyer"
        said = [_sentence(who, *one) for one in english.sentences(_plain(text[:4000]))]
        return english.together([act for act in said if act is not None], text)


def _sentence(who: str, sentence: str, asks: bool) -> Act | None:
    """What the other side says with it."""
    own = tuple(f"{who}_{kind}" for kind in ("limit", "bid", "refuse", "compare", "apart"))
    for kind, slots in english.matches(sentence, FILES, (*own, *BOTH)):
        kind = kind.removeprefix(f"{who}_")
        if not slots:
            return english.simple(kind)
        if all(re.fullmatch("[0-9]{1,2}", slot) for slot in slots.values()):
            number = {n: (int(slot),) for n, slot in slots.items()}
            if kind == "limit":
                return Act(reveal=number[2])
            if kind == "compare":
                return Act(take=number[0], against=number[1], reveal=number[2])
            if kind == "apart":
                return Act(leave=True, reveal=number[2])
            return Act(take=number[0], best=kind == "middle")
    return _free(sentence, asks)


def _plain(text: str) -> str:
    """With prices as whole numbers: 20.00 is 20; 12.50 and 1,200 are two numbers, so that neither is
    read; "one" and "the two of us" are none.
    """
    text = re.sub(r"(?<=\d)\.0+(?!\d)", "", text.replace("$", " "))
    text = re.sub(r"(?<=\d)[.,](?=\d)", " ", text)
    text = re.sub(r"\b(?:the )?two of us\b", "us", text, flags=re.IGNORECASE)
    return re.sub(r"\bone\b", "a", text, flags=re.IGNORECASE)


def _free(sentence: str, asks: bool) -> Act | None:
    """Of nobody's form: a sentence with one number names a limit or a price, unless it denies it or says how
    far a price moves; or it accepts one by its number.
    """
    numbers = re.findall(r"\b\d+\b", sentence)
    if not numbers:
        return english.small_talk(sentence, asks)
    if not asks and (accepted := ACCEPTED.fullmatch(sentence)):
        return Act(accept=True, take=(int(accepted[1]),))
    if MOVES.search(sentence):
        return None
    about_you = re.search(r"\byours?\b", sentence)
    if len(numbers) > 1 or len(numbers[0]) > 2 or about_you:
        return None
    limit = LIMIT.search(sentence)
    if limit and not asks and re.search(r"\b(?:i|im|id|ill|my|me|ive)\b", sentence):
        return Act(reveal=(int(numbers[0]),))
    denied = re.search(r"\b(?:no|not|never|cant|dont|wont|isnt|wouldnt|too)\b", sentence)
    if limit or denied:
        return Act(refuse=True) if denied and not limit else None
    return Act(take=(int(numbers[0]),))


class EnglishPriceGame(ReadFinals, PriceGame):
    """`price` with another telling; the contexts and the scores are the same."""

    failures = PriceGame.failures | KINDS
    words: ClassVar[Any] = PriceWords()
    final_prompt = "What is your final statement?"
    selection_form = f"'The price is N.' with N from 0 to 99, or '{english.LEFT}'"

    def private_text(self, haggle: Haggle, side: int) -> str:
        buys = side == haggle.buyer
        task = (
            f"buy something for {haggle.most} at most"
            if buys
            else f"sell something for {haggle.least} at least"
        )
        role = "buyer" if buys else "seller"
        return english.fill_prompt("price", {"role": role, "task": task, "form": "The price is N."})

    def decisive(self, text: str) -> list[tuple[int, int]]:
        return english.decisive(FILES, text)

    def final_examples(self) -> list[str]:
        return [self.statement(29), english.LEFT]

    def statement(self, price: int) -> str:
        return f"The price is {price}."

    def read(self, words: str) -> str:
        words = words.replace("$", "").replace(" is ", " ").replace(" of ", " ").strip()
        numbers = set(re.findall(r"\d+", words))
        if len(numbers) > 1:
            raise Unread("ambiguous")
        said = r"(?:(?:the|our|my|we agreed on|we agree on|a) )?(?:(?:agreed|final) )?(?:price )?(\d{1,2})"
        match = re.fullmatch(said, words)
        if match is None:
            raise Unread("malformed")
        return f"price {int(match[1])}"
