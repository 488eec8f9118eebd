"""What servers that speak chat completions do: every answer, complaint and cut ends as an answer, a wait or
one clear reason, at few requests. The server is real HTTP on loopback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from duologue.rollout.judge.endpoint import Endpoint
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.questions import AGREEMENT, REQUIRED, SCORE, Case, load_prompt, read_answer
from judge_server import JudgeServer

FOUR = {"knowledge": 0, "benevolence": 5, "power": 3, "vitality": 1, "reason": "so"}
OBJECT = json.dumps(FOUR)
CASE = Case(dilemma="Who pays?", turns=((0, "Half?"), (1, "Half.")), completion="Both pay half.")


def outcome(server: JudgeServer, folder: Path, kind: str = SCORE, **options: Any) -> tuple[Any, str]:
    """The answer of a judge at `server` to one question, and the reason of a None."""
    options = {"deadline_s": 20.0, "timeout_s": 2.0, "model": "known", **options}
    prompts = {kind: load_prompt(kind) for kind in REQUIRED}
    judge = FeedbackJudge(Endpoint(server.url, **options), Ledger(folder / "ledger.sqlite"), prompts)
    try:
        judge.submit(kind, CASE, "tag")
        ((_, answer),) = judge.answered(wait=True)
        return answer, judge.last_fault
    finally:
        judge.close()


def says(server: JudgeServer, content: Any, finish: str | None = "stop", **message: Any) -> None:
    """Let every response be one completion with that content."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    server.script = lambda n, body: (200, {"choices": [choice]}, {})


# ---- an object in its wrapping -----------------------------------------------------------------------------

WRAPPED = {
    "fence": f"```json\n{OBJECT}\n```",
    "plain fence": f"```\n{OBJECT}\n```",
    "thought": f'<think>\nPower is 2: {{"power": 2}}\n</think>\n\n{OBJECT}',
    "end of a thought that the prompt began": f"It {{is}} fine.</think>{OBJECT}",
    "thought in brackets": f"[THINK]Hm.[/THINK]{OBJECT}",
    "channels": f"<|channel|>analysis<|message|>{{}}<|end|><|channel|>final<|message|>{OBJECT}",
    "byte order mark": f"\ufeff{OBJECT}",
    "prose with braces": f"Here {{it}} is: {OBJECT} {{done}}",
    "twice the same": f"{OBJECT}\n{OBJECT}",
    "floats": OBJECT.replace("3", "3.0").replace("5", "5e0"),
    "line break in a string": OBJECT.replace('"so"', '"so\nso"'),
    "a mark of thinking inside of it": OBJECT.replace('"so"', '"no </think> here"'),
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_an_object_is_read_whatever_stands_around_it(
    name: str, judge_server: JudgeServer, tmp_path: Path
) -> None:
    says(judge_server, WRAPPED[name])
    answer, reason = outcome(judge_server, tmp_path)
    assert len(judge_server.requests) == 1, reason
    assert {**answer, "reason": "so"} == FOUR
    assert all(type(answer[key]) is int for key in FOUR if key != "reason")


@pytest.mark.parametrize(
    "content",
    [
        "Five.",
        "```json\n```",
        OBJECT.replace("3", "3.5"),
        OBJECT.replace("3", "7.0"),
        OBJECT.replace("3", "true"),
        OBJECT.replace("3", "NaN"),
        OBJECT.replace("3", '"3"'),
        f"<think>{OBJECT}",
        f"{OBJECT} or {OBJECT.replace('3', '4')}",
        OBJECT[:-1],
    ],
)
def test_what_holds_no_single_valid_object_is_invalid(content: str) -> None:
    with pytest.raises(ValueError):
        read_answer(SCORE, content, CASE)


# ---- quotes ------------------------------------------------------------------------------------------------

SAID = "I don’t mind sharing the café, and I take the books… Deal, then — yes. She said: “Fine”."


@pytest.mark.parametrize(
    "quote",
    [
        "I don't mind sharing",
        '"I don’t mind sharing"',
        "I don’t mind sharing the café.",
        "I don`t mind sharing the cafe\u0301!",
        "“...the books... Deal, then - yes”",
        "I take the books... Deal, then--yes",
        "I don&#39;t".replace("&#39;", "＇") + "\u00a0mind\u200b",
        "**I don't mind**",
        "She said: 'Fine'",
        "«\u2009Deal, then\u2009»",
    ],
)
def test_a_quote_is_compared_as_a_reader_would(quote: str) -> None:
    case = Case(dilemma="", turns=((0, "fine"), (1, SAID)))
    answer = {"agreed": True, "assent": {"1": "Fine".lower(), "2": quote}}
    assert read_answer(AGREEMENT, json.dumps(answer), case) == {"agreed": True}


@pytest.mark.parametrize(
    "quote",
    ["I do mind sharing the books", "i don't mind", "I don't mind ... the books", "...", ""],
)
def test_an_invented_quote_is_invalid(quote: str) -> None:
    case = Case(dilemma="", turns=((0, "fine"), (1, "I don’t mind sharing the café, and I take the books.")))
    with pytest.raises(ValueError, match="does not occur"):
        read_answer(AGREEMENT, json.dumps({"agreed": True, "assent": {"1": "fine", "2": quote}}), case)
