"""What a server's response says, whatever its status: the words of a chat completion, or a complaint, and
whether it will go better the next time.
"""

from __future__ import annotations

import contextlib
import email.utils
import re
import time
from dataclasses import dataclass
from typing import Any

import httpx
from duologue.rollout.judge.wording import writable

_ENDED = ("", "none", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed")
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded")
_BROKEN = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource")
_TEMPORARY = re.compile(
    r"rate.?limit|too.?many.?requests|overload|temporar|throttl|resource.?exhausted|at capacity"
    r"|(try|retry).{0,20} later|server.?(error|busy)|service.?unavailable|timed?.?out\b",
    re.IGNORECASE,
)

_SPENT = re.compile(  # no waiting helps, whatever the status
    r"insufficient.?(quota|balance|credit|fund)|credit balance is too low|billing.?(hard.?limit|not.?active)",
    re.IGNORECASE,
)
_CODES = ("code", "status", "status_code", "http_status")
_WORDS = ("message", "detail", "msg", "type", "param", "code")


class Fault(Exception):
    """Something that may go better the next time, after `pause` seconds (None: a growing pause)."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Refused(Exception):
    """Something that will not: a wrong key, a wrong address."""


class Withheld(Exception):
    """No words where some were due: cut, filtered, refused, not a chat completion. A few tries may help."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The words of a chat completion; `flaw` says why they may be no whole answer, '' when they are."""

    text: str
    flaw: str = ""


def read_reply(response: httpx.Response, limit: str) -> Reply:
    """The words in `response`; `limit` names the setting that cuts them. Raises Fault, Refused, Withheld."""
    code, message = complaint(response)
    if code:
        said = f"HTTP {response.status_code}: {message}"
        if _SPENT.search(message):
            raise Refused(said)
        if code in (408, 409, 425, 429) or code >= 500 or _TEMPORARY.search(message):
            raise Fault(said, _seconds(response.headers.get("Retry-After")))
        raise Refused(said)
    choice = _first_choice(_json(response))
    whole = choice.get("message")
    words: dict[str, Any] = whole if isinstance(whole, dict) else {"content": choice.get("text")}
    text, flaw = _text(words.get("content")), _flaw(choice, words, limit)
    if text is None and not flaw:
        raise Withheld(f"not a chat completion: {response.text}")
    if flaw and not (text or "").strip():
        raise Withheld(flaw)
    return Reply(text=writable(text or ""), flaw=flaw)


def complaint(response: httpx.Response) -> tuple[int, str]:
    """The status that the server means and its words; 0 when it does not complain. An error object counts
    more than the status.
    """
    error = _error(_json(response))
    parts = error if isinstance(error, dict) else {"message": error}
    message = ", ".join(str(parts[key]) for key in _WORDS if parts.get(key))
    code = next((code for key in _CODES if (code := _status(parts.get(key)))), 0)
    if not response.is_success:
        return code or response.status_code, message or response.text
    if message and not code:
        code = 503 if _TEMPORARY.search(message) else 400
    return code, message


def _error(body: Any) -> Any:
    """The error object of a response: of the whole, of its first choice, or the body itself."""
    if not isinstance(body, dict):
        return None
    choice = _first_choice(body)
    finish = str(choice.get("finish_reason")).lower()
    if error := body.get("error") or choice.get("error"):
        return error
    if finish in _BROKEN:
        return {"code": 500, "message": f"finish_reason = {finish!r}"}
    return None if choice else body


def _status(value: Any) -> int:
    """A number that is a status of failure, also in digits; 0 otherwise."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        number = int(value)
        return number if 400 <= number <= 599 else 0
    return 0


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _first_choice(body: Any) -> dict[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) else {}


def _text(content: Any) -> str | None:
    """The text of a content: a string, or a list of parts, of which thoughts and pictures have none."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if texts else None


def _flaw(choice: dict[str, Any], message: dict[str, Any], limit: str) -> str:
    """What the server says of an answer that is no whole one, and which setting helps."""
    finish = str(choice.get("finish_reason") or "").lower()
    if finish in _CUT:
        return f"the answer was cut at {limit} (finish_reason = {finish!r}); a higher limit helps"
    refusal = message.get("refusal")
    if refusal or finish not in _ENDED:
        said = f": {refusal}" if refusal else ""
        return f"the server withheld the answer (finish_reason = {finish!r}){said}; another model may help"
    return ""


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3). What has passed is no wish."""
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, float(retry_after or "")) or None
    with contextlib.suppress(ValueError, TypeError):
        date = email.utils.parsedate_to_datetime(retry_after or "")
        return max(0.0, date.timestamp() - time.time()) or None
    return None
