"""What a judge is asked and what it may answer: the wire format, the same for every back end.

A prompt is a text file with places such as `{completion}`. What others wrote is put there between tags and
escaped (`&lt;` and so on), so that it can neither close its tag nor pass for a turn of somebody else.
An answer is one JSON object, whatever stands around it; a ValueError says what is wrong with one.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duologue.rollout.games.dilemma import ASPECTS, HIGHEST
from duologue.rollout.games.game import Persona
from duologue.rollout.games.template import fill, load_template
from duologue.rollout.judge.wording import find_object, occurs, writable

PROMPTS = Path(__file__).parent / "prompts"
WINNERS = ("1", "2", "tie")
AGREEMENT, SCORE, PREFERENCE = "agreement", "score", "preference"
_ASPECT_LINE = re.compile(rf"^({'|'.join(ASPECTS)}):(.*)$", re.MULTILINE)
_ASPECT_NAME = re.compile(rf'"({"|".join(ASPECTS)})"')
REQUIRED = {AGREEMENT: "transcript", SCORE: "completion", PREFERENCE: "answers"}  # what a prompt must show


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is judged. `turns` are (role, text); `answers` are the two to choose from, in the order in which
    they are shown.
    """

    dilemma: str
    personas: tuple[Persona, ...] = ()
    turns: tuple[tuple[int, str], ...] = ()
    completion: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt file of a kind of question. `version` is the hash of its text."""

    kind: str
    template: str

    @property
    def version(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    def reordered(self, order: Sequence[str]) -> Prompt:
        """With the aspects in this order: the lines that begin with one of them and a colon, where there is
        one of each, and their names in quotation marks.
        """
        lines = dict(_ASPECT_LINE.findall(self.template))
        other = dict(zip(ASPECTS, order, strict=True))

        def line(match: re.Match[str]) -> str:
            return f"{other[match[1]]}:{lines[other[match[1]]]}"

        text = self.template
        if len(lines) == len(ASPECTS) == len(_ASPECT_LINE.findall(text)):
            text = _ASPECT_LINE.sub(line, text)
        return Prompt(self.kind, _ASPECT_NAME.sub(lambda match: f'"{other[match[1]]}"', text))

    def fill(self, case: Case, show_dialogue: bool = True) -> str:
        """The text of the question about `case`."""
        return fill(self.template, self.places(case, show_dialogue))

    def places(self, case: Case, show_dialogue: bool = True) -> dict[str, str]:
        """What goes into its places."""
        personas = (
            _tag("persona", f"{p.name}. {p.instructions}", f' speaker="{i}"')
            for i, p in enumerate(case.personas, 1)
        )
        turns = (_tag("turn", text, f' speaker="{role + 1}"') for role, text in case.turns if show_dialogue)
        return {
            "dilemma": _tag("dilemma", case.dilemma),
            "personas": "\n".join(personas),
            "transcript": "\n".join(turns),
            "completion": _tag("completion", case.completion),
            "answers": "\n".join(
                _tag("answer", text, f' id="{i}"') for i, text in enumerate(case.answers, 1)
            ),
        }


@dataclass(frozen=True, kw_only=True)
class Posed:
    """What a question's text was made of, for a back end that words it in several ways."""

    prompt: Prompt
    case: Case
    show_dialogue: bool

    def text(self, order: Sequence[str] = ASPECTS) -> str:
        """The question, with the aspects in this order."""
        prompt = self.prompt if tuple(order) == ASPECTS else self.prompt.reordered(order)
        return prompt.fill(self.case, self.show_dialogue)


def load_prompt(kind: str, folder: str = "", show_dialogue: bool = False, held: bool = False) -> Prompt:
    """The judge's prompt of `kind`, from `folder` where the user has put one there. `held`: for a model in
    this process, which reads what many questions share once; so that stands first.
    """
    accepted = {"dilemma", "personas", REQUIRED[kind], *(("transcript",) if kind == SCORE else ())}
    required = {REQUIRED[kind], *(("transcript",) if show_dialogue and kind == SCORE else ())}
    return Prompt(
        kind, load_template(folder, PROMPTS / "held" if held else PROMPTS, kind, accepted, required)
    )


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def _tag(name: str, text: str, attribute: str = "") -> str:
    return f"<{name}{attribute}>{escape(text)}</{name}>"


# ---- answers -----------------------------------------------------------------------------------------------


def read_answer(kind: str, content: str, case: Case, held: bool = False) -> dict[str, Any]:
    """The checked answer: {"agreed"}, an integer per aspect and the reason, or {"winner"}.

    `held`: of a model that chose by probability. Scores may then lie between integers, and the probabilities
    are part of the answer.
    """
    answer = find_object(content)
    beside = {"probabilities": answer.get("probabilities")} if held else {}
    if kind == AGREEMENT:
        return _agreement(answer, case.turns, held) | beside
    if not isinstance(answer.get("reason"), str):
        raise ValueError("reason is no text")
    return (_scores(answer, held) if kind == SCORE else _winner(answer)) | beside


def _agreement(answer: dict[str, Any], turns: Sequence[tuple[int, str]], held: bool) -> dict[str, Any]:
    agreed, assent = answer.get("agreed"), answer.get("assent")
    if not isinstance(agreed, bool):
        raise ValueError(f"agreed = {agreed!r}: accepted is true or false")
    if not isinstance(assent, dict) and (agreed or assent is not None):
        raise ValueError("assent is no object with a quote of each speaker")
    for role in (0, 1):
        quote = (assent or {}).get(str(role + 1), "")
        said = [text for who, text in turns if who == role]
        if not isinstance(quote, str) or ((agreed or quote) and not _occurs(quote, said, held)):
            raise ValueError(f"the quote of speaker {role + 1} does not occur in that speaker's turns")
    return {"agreed": agreed}


def _occurs(quote: str, texts: Sequence[str], copied: bool) -> bool:
    """Word for word, as it was said or as it was shown; to the character of one that was copied."""
    if copied:
        return bool(quote.strip()) and any(quote in text for text in texts)
    return any(occurs(quote, form) for text in texts for form in (text, escape(text)))


def _scores(answer: dict[str, Any], held: bool) -> dict[str, Any]:
    kind = "a number" if held else "an integer"
    scores = {}
    for aspect in ASPECTS:
        value: Any = answer.get(aspect)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = number and value in range(HIGHEST + 1)  # 3.0 is an integer of JSON
        if not (whole or (held and number and 0 <= value <= HIGHEST)):
            raise ValueError(f"{aspect} = {value!r}: accepted is {kind} from 0 to {HIGHEST}")
        scores[aspect] = value if held else int(value)
    return {**scores, "reason": writable(answer["reason"])}


def _winner(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("winner") not in WINNERS:
        raise ValueError(f"winner = {answer.get('winner')!r}: accepted is one of {', '.join(WINNERS)}")
    return {"winner": answer["winner"]}


def schema(kind: str) -> dict[str, Any]:
    """The JSON schema of an answer, for servers that hold the model to it."""
    text: dict[str, Any] = {"type": "string"}
    if kind == AGREEMENT:
        return _object({"agreed": {"type": "boolean"}, "assent": _object({"1": text, "2": text})})
    if kind == PREFERENCE:
        return _object({"winner": {"type": "string", "enum": list(WINNERS)}, "reason": text})
    whole = {"type": "integer", "enum": list(range(HIGHEST + 1))}
    return _object({**dict.fromkeys(ASPECTS, whole), "reason": text})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
