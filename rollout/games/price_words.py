"""How a scripted negotiator of `price` says what it means, and how that is read; the forms are in
price_words.toml and, where nothing is named, in deal_words.toml.
"""

from __future__ import annotations

import random
from functools import cache

from duologue.rollout.games.forms import SIMPLE, Forms, merged, plain
from duologue.rollout.games.scripted import Act, phrases
from duologue.rollout.games.selection import CLOSE

NUMBER = "(?:0|[1-9][0-9]?)"
SHARED = ("leave", "bye", "agree", "hurry", "confirm")


def utter(act: Act, buys: bool, rng: random.Random) -> str:
    """The act of a buyer or a seller in words."""
    words, of_price = phrases("deal"), phrases("price")
    side = "buyer" if buys else "seller"
    price, theirs, own = (vector[0] if vector else 0 for vector in (act.take, act.against, act.reveal))
    bid = of_price["middle" if act.best else f"{side}_bid"]
    parts = (
        (act.accept, words["agree"]),
        (act.confirm, words["confirm"]),
        (act.refuse, of_price[f"{side}_refuse"]),
        (act.reveal and not act.against, of_price[f"{side}_limit"]),
        (act.take, of_price["compare"] if act.against else bid),
        (act.ask, of_price["ask"]),
        (act.leave, words["leave"]),
        (act == Act(close=True), words["hurry"]),
    )
    said = [rng.choice(forms).format(price, theirs, own) for wanted, forms in parts if wanted]
    return " ".join([*said, CLOSE] if act.close else said)


def understood(text: str, buys: bool) -> Act:
    """The act that an utterance of a buyer or a seller says, as far as it is understood."""
    parts = []
    for kind, slots in _forms("buyer" if buys else "seller").clauses(plain(text)):
        numbers = [(int(slot),) for slot in slots]
        if kind in SIMPLE:
            parts.append(SIMPLE[kind])
        elif kind == "limit":
            parts.append(Act(reveal=numbers[0]))
        elif kind == "compare":
            parts.append(Act(take=numbers[0], against=numbers[1], reveal=numbers[2]))
        else:
            parts.append(Act(take=numbers[0], best=kind == "middle"))
    return merged(parts, text.endswith(CLOSE))


@cache
def _forms(side: str) -> Forms:
    words, of_price = phrases("deal"), phrases("price")
    forms = {kind: of_price[kind] for kind in ("compare", "middle", "ask")}
    forms |= {kind: of_price[f"{side}_{kind}"] for kind in ("limit", "bid", "refuse")}
    forms |= {kind: words[kind] for kind in SHARED}
    return Forms(forms, dict.fromkeys(("compare", "middle", "limit", "bid"), (NUMBER,) * 3))
