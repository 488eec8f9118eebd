"""What servers that speak chat completions do: every answer, complaint and cut ends as an answer, a wait or
one clear reason, at few requests. The server is real HTTP on loopback.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from duologue.rollout.judge.asking import Asking
from duologue.rollout.judge.endpoint import ChatEndpoint, Endpoint
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.ledger import Ledger
from duologue.rollout.judge.questions import AGREEMENT, REQUIRED, SCORE, Case, load_prompt, read_answer
from duologue.rollout.judge.wording import spoken
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


# ---- errors inside of HTTP 200, and redirects --------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "Rate limit exceeded", "code": 429}},
        {"error": {"message": "No instances", "code": 503}},
        {"error": {"message": "Slow down", "code": "429"}},
        {"error": {"message": "Overloaded", "type": "overloaded_error"}},
        {"error": "The model is temporarily unavailable"},
        {"object": "error", "message": "Too Many Requests", "code": 1302},
        {"detail": "Service Unavailable"},
        {"choices": [{"error": {"code": 502, "message": "bad"}, "message": {"content": ""}}]},
        {"choices": [{"finish_reason": "error", "message": {"content": ""}}]},
    ],
)
def test_a_temporary_error_inside_200_is_waited_out(
    error: dict[str, Any], judge_server: JudgeServer, tmp_path: Path
) -> None:
    ends = time.monotonic() + 1.0
    judge_server.script = lambda n, body: (200, error, {}) if time.monotonic() < ends else None
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is not None, reason
    assert len(judge_server.requests) <= 6


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}),
        (200, {"error": {"message": "The model `x` does not exist", "code": 404}}),
        (200, {"error": "The model `x` does not exist"}),
        (200, {"detail": "The model `x` does not exist"}),
        (500, {"error": {"message": "The model `x` does not exist", "code": 404}}),
    ],
)
def test_an_error_that_stays_ends_the_question_with_the_servers_words(
    status: int, error: dict[str, Any], judge_server: JudgeServer, tmp_path: Path
) -> None:
    judge_server.script = lambda n, body: (status, error, {})
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is None
    assert "The model `x` does not exist" in reason
    assert len(judge_server.requests) == 1


def test_a_rate_limit_by_another_status_is_waited_out(judge_server: JudgeServer, tmp_path: Path) -> None:
    judge_server.script = lambda n, body: (403, {"message": "API rate limit exceeded"}, {}) if n < 2 else None
    assert outcome(judge_server, tmp_path)[0] is not None


def test_a_wait_of_no_seconds_grows_all_the_same(judge_server: JudgeServer, tmp_path: Path) -> None:
    ends = time.monotonic() + 1.0
    judge_server.script = lambda n, body: (429, {}, {"Retry-After": "0"}) if time.monotonic() < ends else None
    assert outcome(judge_server, tmp_path)[0] is not None
    assert len(judge_server.requests) <= 6


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_on_the_same_host_is_followed(
    status: int, judge_server: JudgeServer, tmp_path: Path
) -> None:
    right = "/v1/chat/completions"
    judge_server.script = lambda n, body: (
        (status, {}, {"Location": right}) if judge_server.paths[n] != right else None
    )
    judge_server.url = judge_server.url.replace("/v1", "/old")
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is not None, reason
    assert len(judge_server.requests) == 2


@pytest.mark.parametrize("place", ["http://other.invalid/v1/chat/completions", "/v1/chat/completions", ""])
def test_a_redirect_elsewhere_or_in_a_circle_quotes_the_place(
    place: str, judge_server: JudgeServer, tmp_path: Path
) -> None:
    judge_server.script = lambda n, body: (307, {}, {"Location": place} if place else {})
    answer, reason = outcome(judge_server, tmp_path, api_key="sk-1")
    assert answer is None
    assert (place or "HTTP 307") in reason
    assert len(judge_server.requests) == (5 if place.startswith("/") else 1)


# ---- answers that are cut or withheld ----------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", None, OBJECT[:-5], "<think>Well", [{"type": "thinking"}]])
def test_a_cut_answer_names_its_limit(content: Any, judge_server: JudgeServer, tmp_path: Path) -> None:
    says(judge_server, content, "length", reasoning_content="Let me see")
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is None
    assert "the answer was cut at judge.max_tokens = 512" in reason
    assert len(judge_server.requests) == 3


@pytest.mark.parametrize(
    ("finish", "message", "says_so"),
    [
        ("content_filter", {}, "content_filter"),
        ("SAFETY", {}, "safety"),
        ("tool_calls", {"tool_calls": []}, "tool_calls"),
        ("stop", {"refusal": "I cannot judge this."}, "I cannot judge this."),
    ],
)
@pytest.mark.parametrize("content", ["", None, OBJECT[:-5]])
def test_a_withheld_answer_says_what_the_server_said(
    finish: str,
    message: dict[str, Any],
    says_so: str,
    content: Any,
    judge_server: JudgeServer,
    tmp_path: Path,
) -> None:
    says(judge_server, content, finish, **message)
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is None
    assert says_so in reason
    assert len(judge_server.requests) == 3


def test_a_whole_answer_is_taken_although_it_is_marked_as_cut(
    judge_server: JudgeServer, tmp_path: Path
) -> None:
    says(judge_server, OBJECT, "length")
    assert outcome(judge_server, tmp_path)[0] == FOUR


BODIES = [b"<html>Log in</html>", b"", b"[]", b"\xff\xfe\xfa", b'{"choices": []}', b"{" * 9]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_completion_is_asked_for_three_times(
    body: bytes, judge_server: JudgeServer, tmp_path: Path
) -> None:
    judge_server.script = lambda n, sent: (200, body, {})
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is None
    assert "not a chat completion" in reason
    assert len(judge_server.requests) == 3


# ---- other forms -------------------------------------------------------------------------------------------


def test_content_may_be_parts(judge_server: JudgeServer, tmp_path: Path) -> None:
    half = {"type": "text", "text": OBJECT[:9]}, {"type": "text", "text": OBJECT[9:]}
    says(judge_server, [{"type": "thinking", "thinking": []}, *half])
    assert outcome(judge_server, tmp_path)[0] == FOUR


@pytest.mark.parametrize("words", ["so \\ud83d", "so \ud83d"], ids=["escaped", "bare"])
def test_half_a_surrogate_pair_becomes_the_replacement_character(
    words: str, judge_server: JudgeServer, tmp_path: Path
) -> None:
    says(judge_server, OBJECT.replace('"so"', f'"{words}"'))
    assert "\ufffd" in outcome(judge_server, tmp_path)[0]["reason"]
    assert len(judge_server.requests) == 1


# ---- parameters --------------------------------------------------------------------------------------------

NO_MAX_TOKENS = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
NO_TEMPERATURE = (
    "'temperature' does not support 0.0 with this model. Only the default (1) value is supported."
)


@pytest.mark.parametrize("status", [200, 400, 422])
def test_a_refused_parameter_is_replaced_or_left_out_for_the_whole_run(
    status: int, judge_server: JudgeServer, tmp_path: Path
) -> None:
    def script(n: int, body: dict[str, Any]) -> Any:
        says = NO_MAX_TOKENS if "max_tokens" in body else NO_TEMPERATURE if "temperature" in body else ""
        return (status, {"error": {"message": says, "type": "invalid_request_error"}}, {}) if says else None

    judge_server.script = script
    prompts = {kind: load_prompt(kind) for kind in REQUIRED}
    endpoint = Endpoint(judge_server.url, concurrency=1)
    judge = FeedbackJudge(endpoint, Ledger(tmp_path / "ledger.sqlite"), prompts)
    for i in range(4):
        judge.submit(SCORE, Case(dilemma="", completion=str(i)), i)
    answers = [judge.answered(wait=True) for _ in range(4)]
    judge.close()
    assert all(answer is not None for come in answers for _, answer in come)
    assert len(judge_server.requests) == 6
    last = judge_server.requests[-1]
    assert last["max_completion_tokens"] == 512
    assert "response_format" in last
    assert not {"temperature", "max_tokens"} & set(last)


@pytest.mark.parametrize(
    "words",
    [
        "max_tokens = 512 is above the context of 256",
        "Invalid 'max_tokens': integer above maximum value. Expected a value <= 256, but got 512 instead.",
    ],
)
def test_a_limit_that_is_too_high_is_not_given_up(
    words: str, judge_server: JudgeServer, tmp_path: Path
) -> None:
    judge_server.script = lambda n, body: (400, {"error": words}, {})
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is None
    assert words in reason
    assert all(body["max_tokens"] == 512 for body in judge_server.requests)


# ---- the opponent's server ---------------------------------------------------------------------------------


@pytest.fixture
def spoken_by(judge_server: JudgeServer, tmp_path: Path) -> Iterator[Callable[[], tuple[Any, str]]]:
    """What the opponent at the server says to one request, and the reason of a None."""
    endpoint = ChatEndpoint(judge_server.url, deadline_s=20.0)
    server = Asking(endpoint, Ledger(tmp_path / "ledger.sqlite"))

    def say() -> tuple[Any, str]:
        body = {"messages": [{"role": "user", "content": "Half?"}], "max_tokens": 8, "seed": 1, "top_p": 0.9}
        server.begin("tag", kind="turn", version="turn", text=json.dumps(body), read=spoken)
        ((_, text),) = server.answers(None)
        return text, server.last_fault

    yield say
    server.close()


def test_an_opponent_is_heard_without_its_thinking(
    spoken_by: Callable[[], tuple[Any, str]], judge_server: JudgeServer
) -> None:
    says(judge_server, "<think>Half is much.</think>\n\nNo.", "length")
    assert spoken_by()[0].strip() == "No."


@pytest.mark.parametrize("content", ["", None, "<think>Half is"])
def test_an_opponent_that_is_cut_before_its_first_word(
    content: Any, spoken_by: Callable[[], tuple[Any, str]], judge_server: JudgeServer
) -> None:
    says(judge_server, content, "length")
    text, reason = spoken_by()
    assert text is None
    assert "max_tokens = 8" in reason
    assert len(judge_server.requests) == 3


def test_an_opponent_without_a_seed(
    spoken_by: Callable[[], tuple[Any, str]], judge_server: JudgeServer
) -> None:
    says(judge_server, "No.")
    well = judge_server.script
    judge_server.script = lambda n, body: (
        (400, {"message": "seed is not supported"}, {}) if "seed" in body else well(n, body)
    )
    assert spoken_by()[0] == "No."
    assert len(judge_server.requests) == 2
    assert judge_server.requests[1]["top_p"] == 0.9


def test_an_opponents_rate_limit_inside_200_is_waited_out(
    spoken_by: Callable[[], tuple[Any, str]], judge_server: JudgeServer
) -> None:
    says(judge_server, "No.")
    well = judge_server.script
    busy = {"error": {"message": "Rate limit exceeded", "code": 429}}
    judge_server.script = lambda n, body: (200, busy, {}) if n < 2 else well(n, body)
    assert spoken_by()[0] == "No."
