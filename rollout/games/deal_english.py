"""`deal` and `priorities` told in English: prompts, final statements, and how scripted negotiators speak."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

from duologue.rollout.games import english
from duologue.rollout.games.deal import Deal, DealGame, less
from duologue.rollout.games.english import listed, pick
from duologue.rollout.games.finals import KINDS, ReadFinals, Unread
from duologue.rollout.games.priorities import ALONE, PrioritiesGame
from duologue.rollout.games.scripted import Act
from duologue.rollout.games.selection import Vector

NAMES = ("Ann", "Ben")  # of the two sides
OFFERS = ("offer", "joint", "recap")
ITEM_KINDS = ("want", "spare", "reason")
FRAMES = (  # of values: of each type with its number, of the first, of the others
    ("a {0} is worth {1}", "a {0} {1}"),
    ("each {0} is worth {1}", "each {0} {1}"),
    ("a {0} counts {1}", "a {0} {1}"),
    ("{1} for a {0}", "{1} for a {0}"),
    ("every {0} is worth {1} points", "every {0} {1}"),
)
COMPARED = (  # of both values, the speaker's first: of the first type, of the others, who gets how many
    ("a {0} is worth {1} to {2} and {3} to {4}", "a {0} {1} to {2} and {3} to {4}", "{0} gets {1}"),
    ("each {0} counts {1} for {2} and {3} for {4}", "each {0} {1} for {2} and {3} for {4}", "{0} takes {1}"),
)
DECIDES = re.compile(rf", so ({'|'.join(NAMES)})\b")  # who gets an item, by the two values before it
FILLERS = {"a", "an", "the", "each", "every", "is", "are", "worth", "points", "point", "and", "at", "for"}
FILLERS |= {"apiece", "me", "to", "of", "count", "counts", "be"}
ARTICLES = {"a": 1, "an": 1}
ALL = "everything|all of it|all of them"
REST = "the rest|the others|the remainder|whatever is left|what remains|everything else"
LEAD = "(?:how about|what about|so|ok|okay|then|maybe|i suggest|i propose|lets say|my offer)"
GET = "(?:would |will |can |could )?(?:take|get|keep|have|want|like|receive)"


class DealWords:
    """Of a game with these files of words. `ranked`: values are an order, and items come in packages."""

    def __init__(self, files: tuple[str, ...], ranked: bool = False) -> None:
        self.files, self.ranked = files, ranked

    # ---- speaking ------------------------------------------------------------------------------------------

    def utter(self, side: Any, act: Act) -> str:
        words, rng = english.words_of(self.files), side.rng
        said = []
        if act.accept or act.confirm:
            said.append(pick(words, "agree" if act.accept else "confirm", rng))
        if act.accept and side.agreed is not None:
            said.append(pick(words, "recap", rng, self._division(side, side.agreed)))
        lost = side.heard > 0 and side.last == Act() and not act.accept
        if lost and not act.close:
            said.append(pick(words, "again", rng))
        if act.refuse:
            kind = "refuse" if act.want is None else "reason"
            said.append(pick(words, kind, rng, self._all(side, act.want or 0)))
        if act.against is not None:
            said.append(pick(words, "compare", rng, self._compared(side, act)))
        elif act.reveal is not None and (act.take is None or not side.stated or rng.random() < 0.2):
            kind = "also" if side.theirs is not None and rng.random() < 0.6 else "reveal"
            said.append(pick(words, kind, rng, *self._values(side, act.reveal)))
            side.stated = True
        for kind, k in (("want", None if act.refuse else act.want), ("spare", act.spare)):
            if k is not None:
                said.append(pick(words, kind, rng, self._all(side, k)))
        if act.take is not None:
            said.append(pick(words, "joint" if act.best else "offer", rng, self._division(side, act.take)))
        if act.ask and not lost:
            said.append(pick(words, "ask", rng))
        if act.leave:
            said.append(pick(words, "bye" if side.last.leave else "leave", rng))
        if act.close:
            said += [english.DONE] if said else [pick(words, "hurry", rng), english.DONE]
        return " ".join(said)

    def name(self, item: str, n: int) -> str:
        return item if self.ranked or n == 1 else f"{item}s"

    def _all(self, side: Any, k: int) -> str:
        return self.name(side.game.items[k], side.counts[k])

    def _values(self, side: Any, values: Vector) -> list[str]:
        items = side.game.items
        if self.ranked:
            return [item for _, item in sorted(zip(values, items, strict=True), reverse=True)]
        first, later = side.rng.choice(FRAMES)
        named = [
            (first if k == 0 else later).format(item, value)
            for k, (item, value) in enumerate(zip(items, values, strict=False))
        ]
        return [listed(named)]

    def _compared(self, side: Any, act: Act) -> str:
        """Both values of each item, by name, and who is to get it, said where its two numbers stand."""
        assert act.take is not None
        assert act.reveal is not None
        assert act.against is not None
        first, later, winner = side.rng.choice(COMPARED)
        own, other = by_role(side.role, *NAMES)
        items = [f"package of {item}" if self.ranked else item for item in side.game.items]
        rows = zip(items, act.reveal, act.against, act.take, less(side.counts, act.take), strict=True)
        said = []
        for k, (item, mine, theirs, *split) in enumerate(rows):
            shares = zip(NAMES, by_role(side.role, *split), strict=True)
            gets = " and ".join(winner.format(who, n) for who, n in shares if n)
            form = later if k else first
            said.append(f"{form.format(item, mine, own, theirs, other)}, so {gets}")
        return ", and ".join(filter(None, (", ".join(said[:-1]), said[-1])))

    def _division(self, side: Any, take: Vector) -> str:
        """All of it, Ann's share first, whoever speaks: who accepts it says the same words again."""
        shares = by_role(side.role, take, less(side.counts, take))
        return ", and ".join(
            f"{who} gets {self._numbers(side, n)}" for who, n in zip(NAMES, shares, strict=True)
        )

    def _numbers(self, side: Any, share: Vector) -> str:
        """As a final statement names it."""
        named = zip(share, side.game.items, strict=True)
        return listed([f"{n} {self.name(item, n)}" for n, item in named])

    # ---- reading -------------------------------------------------------------------------------------------

    def understood(self, side: Any, text: str) -> Act:
        """As far as it is clear: values and offers only when they are complete and add up."""
        said = [self._sentence(side, *one) for one in english.sentences(text[:4000])]
        return english.together([act for act in said if act is not None], text)

    def _sentence(self, side: Any, sentence: str, asks: bool) -> Act | None:
        items = side.game.items
        kinds = tuple(english.words_of(self.files))
        for kind, slots in english.matches(sentence, self.files, kinds):
            if not slots:
                return english.simple(kind)
            if kind in OFFERS:
                if (take := self._taken(side, slots[0])) is not None:
                    return Act(take=take, best=kind == "joint")
            elif kind == "compare":
                if both := compared_in(slots[0], items):
                    own, other = by_role(1 - side.role, *both)
                    return Act(reveal=own, against=other)
            elif kind in ITEM_KINDS:
                named = [k for k, item in enumerate(items) if slots[0] in (item, f"{item}s")]
                if named:
                    k = named[0]
                    return Act(spare=k) if kind == "spare" else Act(want=k, refuse=kind == "reason")
            elif values := self._read_values(slots, items):
                return Act(reveal=values)
        return self._free(side, sentence, asks)

    def _read_values(self, slots: dict[int, str], items: Sequence[str]) -> Vector | None:
        if not self.ranked:
            return values_in(slots[0].split(), items)
        ranked = [re.sub("^the ", "", slots[n]) for n in range(3)]
        return tuple(5 - ranked.index(item) for item in items) if sorted(ranked) == sorted(items) else None

    def _free(self, side: Any, sentence: str, asks: bool) -> Act | None:
        """Of nobody's form: who takes what, or what things are worth to the speaker."""
        items = side.game.items
        if (take := self._taken(side, sentence)) is not None:
            return Act(take=take)
        words = sentence.split()
        if not asks and not {"you", "your", "yours"} & {*words} and not DEMAND.search(sentence):
            for start in range(len(words) if not self.ranked else 0):
                if values := values_in(words[start:], items):
                    return Act(reveal=values)
        act = english.small_talk(sentence, asks)
        named = {*words} & {form for item in items for form in (item, f"{item}s")}
        return None if act and act.accept and named else act  # "okay, the ball" is no acceptance

    def _taken(self, side: Any, words: str) -> Vector | None:
        """What the words leave to the speaker, who is the other side, unless they deny it."""
        if DENIED.search(words):
            return None
        for pattern, order, named in FREE:
            for match in re.finditer(pattern, words):
                mine, yours = (match[n] for n in (order[::-1] if named and side.role == 0 else order))
                take = self.division(mine, yours, side.game.items, side.counts)
                if take is not None:
                    return take
        return None

    def division(self, mine: str, yours: str, items: Sequence[str], counts: Vector) -> Vector | None:
        """What the speaker would take, None where the two shares do not divide just what there is."""
        take, left = (self.share(words, tuple(items), counts) for words in (mine, yours))
        if re.fullmatch(REST, mine.strip()):
            take = less(counts, left) if left is not None and any(left) else None
        elif re.fullmatch(REST, yours.strip()):
            left = less(counts, take) if take is not None and any(take) else None
        if take is None or left is None or any(n < 0 for n in (*take, *left)):
            return None
        return take if less(counts, take) == left else None

    def share(self, words: str, items: tuple[str, ...], counts: Vector) -> Vector | None:
        """How many of each type the words name, None where that is not clear."""
        words = words.strip()
        if words in ("nothing", "none"):
            return (0,) * len(items)
        if re.fullmatch(ALL, words):
            return counts
        amount, whole = _amounts(items)
        if not whole.fullmatch(words):
            return None
        share = [0] * len(counts)
        for many, item in amount.findall(words):
            k = items.index(item.removesuffix("s") if item not in items else item)
            n = _number(many, item, counts[k], self.ranked)
            if n is None or share[k]:
                return None
            share[k] = n
        return tuple(share)


DENIED = re.compile(r"\b(?:not|never|unfair|cant|dont|wont|isnt|doesnt|wouldnt)\b")
DEMAND = re.compile(r"\b(?:i|id|ill|me) (?:would |will )?(?:take|get|keep|have|want|like|receive)\b")
BETWEEN = "(?: and| while| then| if)?"
GETS = "(?:gets|takes|keeps|has|receives|will get|would get)"
FREE = (  # of a division: where the speaker's share and the other's stand, or Ann's and Ben's
    (rf"\b(?:i|id|ill|me) {GET} (.+?){BETWEEN} (?:you|youd|youll) {GET} (.+)$", (1, 2), False),
    (rf"\b(?:you|youd|youll) {GET} (.+?){BETWEEN} (?:i|id|ill) {GET} (.+)$", (2, 1), False),
    (rf"^(?:{LEAD} )*(.+?) for me (?:and )?(.+?) for you$", (1, 2), False),
    (rf"^(?:{LEAD} )*(.+?) for you (?:and )?(.+?) for me$", (2, 1), False),
    (rf"\bann {GETS} (.+?){BETWEEN} ben {GETS} (.+)$", (1, 2), True),
    (rf"\bben {GETS} (.+?){BETWEEN} ann {GETS} (.+)$", (2, 1), True),
)


def by_role(role: int, own: Any, other: Any) -> tuple[Any, Any]:
    """Of what is a side's own and the other's, Ann's first; and back."""
    return (own, other) if role == 0 else (other, own)


@cache
def _amounts(items: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    many = r"(?:(?:the )?\d{1,3}(?: of the)?|all \d{1,3}|all the|all of the|all|"
    many += r"both the|both of the|both|the|an?|no)"
    item = "|".join(f"{item}s?" for item in items)
    one = rf"({many})(?: (?:packages?|units?)(?: of)?| of)? ({item})\b"
    plain = rf"{many}(?: (?:packages?|units?)(?: of)?| of)? (?:{item})"
    return re.compile(one), re.compile(rf"{plain}(?: (?:and )?{plain})*")


def _number(many: str, item: str, count: int, uncounted: bool) -> int | None:
    """How many items a phrase means; "the hats" and "all hats" are all that there are."""
    if digits := re.search(r"\d+", many):
        n = int(digits[0])
        return n if not many.startswith("all") or n == count else None
    if many in ("a", "an", "no"):
        return 0 if many == "no" else 1
    if many.startswith("both"):
        return 2 if count == 2 else None
    return count if uncounted or count == 1 or item.endswith("s") or many.startswith("all") else None


def values_in(words: Sequence[str], items: Sequence[str]) -> Vector | None:
    """The number of each item, where every one has just one, before it or after it throughout."""
    found: list[tuple[bool, str]] = []
    for word in words:
        item = word.removesuffix("s")
        if item in items or word.isdecimal() or word in ("nothing", "none"):
            found.append((item in items, item if item in items else word))
        elif word not in FILLERS:
            return None
    if len(found) != 2 * len(items) or any(a[0] == b[0] for a, b in pairwise(found)):
        return None
    pairs = [sorted(found[n : n + 2], reverse=True) for n in range(0, len(found), 2)]
    values = {pair[0][1]: pair[1][1] for pair in pairs}
    if len(values) != len(items):
        return None
    return tuple(int(values[item]) if values[item].isdecimal() else 0 for item in items)


def compared_in(words: str, items: Sequence[str]) -> tuple[Vector, Vector] | None:
    """Ann's and Ben's values, where each item is followed by both with their names."""
    one = r"(\d+) (?:to|for) (ann|ben)"
    found = re.findall(rf"\b({'|'.join(items)})\D+?{one} and {one}", words)
    values = {item: {a: int(x), b: int(y)} for item, x, a, y, b in found if a != b}
    if len(found) != len(items) or len(values) != len(items):
        return None
    first, second = zip(*((values[item]["ann"], values[item]["ben"]) for item in items), strict=True)
    return first, second


# ---- the games ---------------------------------------------------------------------------------------------


class EnglishDealGame(ReadFinals, DealGame):
    """`deal` with another telling; the contexts and the scores are the same."""

    failures = DealGame.failures | KINDS
    words: ClassVar[Any] = DealWords(("english", "deal_english"))
    final_prompt = "What is your final statement?"

    def private_text(self, deal: Deal, side: int) -> str:
        things = listed([self._counted(c, item) for c, item in zip(deal.counts, self.items, strict=True)])
        values = listed(
            [f"each {item} is worth {v}" for item, v in zip(self.items, deal.values[side], strict=True)]
        )
        places = {"things": things, "values": values, "form": self._form, "name": NAMES[side]}
        return english.fill_prompt("deal", places)

    def _counted(self, n: int | str, item: str) -> str:
        return f"{n} {self.words.name(item, 1 if n == 1 else 2)}"

    def decisive(self, text: str) -> list[tuple[int, int]]:
        return [match.span(1) for match in DECIDES.finditer(text)]

    def final_examples(self) -> list[str]:
        return [self.statement([2] * len(self.items))]

    @property
    def _form(self) -> str:
        return f"I get {listed([self._counted('N', item) for item in self.items])}."

    @property
    def selection_form(self) -> str:  # type: ignore[override]
        return f"'{self._form}', what you get of each"

    def statement(self, take: Sequence[int]) -> str:
        return f"I get {listed([self._counted(n, item) for n, item in zip(take, self.items, strict=True)])}."

    def read(self, words: str) -> str:
        """The plain statement of the words of a final one, which are in their normal spelling."""
        words = re.sub(rf"^(?:(?:so|then|and) )?(?:(?:i|id|ill|me) (?:{GET} )?|my share is )", "", words)
        named = [word.removesuffix("s") for word in words.split()]
        times = Counter(word for word in named if word in self.items)
        if any(n > 1 for n in times.values()):
            raise Unread("ambiguous")
        take = _each(words, self.items)
        if times and len(times) < len(self.items) and take:
            raise Unread("incomplete")
        if take is None or len(take) < len(self.items):
            raise Unread("malformed")
        return DealGame.statement(self, [take[item] for item in self.items])


def _each(words: str, items: Sequence[str]) -> dict[str, int] | None:
    """The number that stands with each item that is named: before all of them, or after all of them."""
    words = re.sub(r"\bno\b", "0", words)
    item = "|".join(f"{item}s?" for item in items)
    before = rf"(\d{{1,4}}|an?) (?:(?:packages?|units?) (?:of )?|of (?:the )?)?({item})"
    for one, order in ((before, (0, 1)), (rf"({item}) (\d{{1,4}})", (1, 0))):
        if re.fullmatch(rf"(?:the )?{one}(?: (?:and |the )*{one})*", words):
            pairs = [(found[order[0]], found[order[1]]) for found in re.findall(one, words)]
            return {name if name in items else name[:-1]: ARTICLES.get(n) or int(n) for n, name in pairs}
    return None


class EnglishPrioritiesGame(EnglishDealGame, PrioritiesGame):
    """`priorities` with another telling."""

    name = "priorities"
    Settings = PrioritiesGame.Settings
    failures = PrioritiesGame.failures | KINDS
    words: ClassVar[Any] = DealWords(("english", "deal_english", "priorities_english"), ranked=True)

    @property
    def selection_form(self) -> str:  # type: ignore[override]
        return f"{super().selection_form}, or '{english.LEFT}'"

    def _counted(self, n: int | str, item: str) -> str:
        return f"{n} package{'' if n == 1 else 's'} of {item}"

    def private_text(self, deal: Deal, side: int) -> str:
        worth = zip(self.items, deal.values[side], strict=True)
        values = listed([f"each package of {item} is worth {v} points" for item, v in worth])
        things = listed([self._counted(c, item) for c, item in zip(deal.counts, self.items, strict=True)])
        places = {"things": things, "values": values, "form": self._form, "name": NAMES[side]}
        places["alone"] = str(ALONE)
        return english.fill_prompt("priorities", places)

    def statement(self, take: Sequence[int]) -> str:
        return f"I get {listed([f'{n} {item}' for n, item in zip(take, self.items, strict=True)])}."

    @property
    def _form(self) -> str:
        return f"I get {listed([f'N {item}' for item in self.items])}."
