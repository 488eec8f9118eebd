"""Whatever a server sends, a question to it ends: as an answer, or as one line of reason, in as many requests
as its user would accept. A real server on loopback sends what Hypothesis makes of a good response.
"""

from __future__ import annotations

import gzip
import json
import queue
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from duologue.rollout.judge import endpoint as endpoints
from duologue.rollout.judge.asking import Ask
from duologue.rollout.judge.endpoint import ChatEndpoint, Endpoint
from duologue.rollout.judge.questions import SCORE, Case, read_answer
from duologue.rollout.judge.wording import spoken
from hypothesis import given
from hypothesis import strategies as st
from judge_server import ASPECTS
from test_faults_files import damaged_bytes, damaged_json
from test_faults_search import search

SAID = json.dumps({**dict.fromkeys(ASPECTS, 3), "reason": "fair"})
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": SAID}}
GOOD = {"id": "1", "model": "m", "choices": [CHOICE], "error": None, "usage": {"total_tokens": 9}}
STATUSES = (
    100,
    101,
    199,
    200,
    201,
    204,
    206,
    301,
    302,
    304,
    307,
    400,
    401,
    404,
    408,
    413,
    422,
    429,
    500,
    503,
)
CODES = (*STATUSES, 529, 599, 600, 999)
HEADERS = {
    "Retry-After": ("0", "0.01", "-1", "nan", "inf", "1e9", "soon", "Fri, 31 Dec 1999 23:59:59 GMT", ""),
    "Content-Encoding": ("gzip", "br", "deflate", "zstd", "identity", "x"),
    "Content-Type": (
        "text/html",
        "application/json; charset=utf-16",
        "application/json; charset=nonsense",
        "",
    ),
    "Transfer-Encoding": ("chunked", "gzip"),
    "Content-Length": ("0", "5", "-1", "99999", "x"),
    "Location": ("", "/v1/chat/completions", "http://127.0.0.1:1/", "ftp://x/", "//[", "?", "\u00ff"),
    "Connection": ("close", "upgrade"),
}
ERRORS: tuple[Any, ...] = (
    "no",
    {"message": "Rate limit exceeded", "code": 429},
    {"message": "You exceeded your current quota", "code": "insufficient_quota"},
    {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "code": 400},
    {"message": "'temperature' does not support 0.0", "code": "400"},
    [{"message": None}],
    {"code": 10**30, "message": {"a": ["b"]}},
    {"message": "x\n" * 400},
)
LIMIT = 24  # requests


class Server(socketserver.ThreadingTCPServer):
    """Answers each request with the next of `replies`, bytes as they are, and the last again and again."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.replies: list[bytes] = []
        self.asked = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        return


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        length = 0
        while line := self.rfile.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        reply = self.server.replies[min(self.server.asked, len(self.server.replies) - 1)]
        self.server.asked += 1
        self.wfile.write(reply)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def response(status: int, headers: dict[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} Words"]
    named = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines += [f"{name}: {value}" for name, value in named.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


WELL = response(200, {}, json.dumps(GOOD).encode())


@st.composite
def replies(draw: Any) -> bytes:
    """A response of which something is not as it should be."""
    value = {**GOOD, "error": draw(st.sampled_from(ERRORS))} if draw(st.integers(0, 3)) == 0 else GOOD
    body = json.dumps(value).encode()
    if draw(st.booleans()):
        body = damaged_json(body, draw)
    match draw(st.integers(0, 7)):
        case 0:
            body = damaged_bytes(body, draw)
        case 1:
            body = body.decode().encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "cp037"])))
        case 2:
            body = draw(st.binary(max_size=40) | st.sampled_from([b"", b"null", b"[" * 100_000, b"<html>no"]))
        case 3:
            body = gzip.compress(body)[: draw(st.integers(1, 400))]
    status = draw(st.sampled_from(CODES)) if draw(st.booleans()) else 200
    names = draw(st.lists(st.sampled_from(sorted(HEADERS)), max_size=2, unique=True))
    raw = response(status, {name: draw(st.sampled_from(HEADERS[name])) for name in names}, body)
    return damaged_bytes(raw, draw) if draw(st.integers(0, 5)) == 0 else raw


@pytest.mark.parametrize("who", ["judge", "opponent"])
def test_whatever_a_server_sends_a_question_ends(
    who: str, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoints, "_BACKOFF", lambda state: 0.001 * 2**state.attempt_number)
    limits = {"deadline_s": 0.2, "timeout_s": 0.1}
    asked = Endpoint(server.url, **limits) if who == "judge" else ChatEndpoint(server.url, **limits)
    text = "how good?" if who == "judge" else json.dumps({"messages": [], "max_tokens": 8, "temperature": 1})
    url = asked._url
    case = Case(dilemma="", completion="x")

    def read(content: str) -> None:
        read_answer(SCORE, content, case) if who == "judge" else spoken(content)

    @search(0.17)
    @given(st.lists(replies(), min_size=1, max_size=3), st.booleans())
    def look(bad: list[bytes], recovers: bool) -> None:
        server.replies = [*bad, WELL] if recovers else bad
        server.asked = 0
        asked._url, asked._refused = url, frozenset()
        done: queue.SimpleQueue[tuple[str | None, str]] = queue.SimpleQueue()
        asked.ask(Ask(kind=SCORE, text=text, check=read, done=lambda *answer: done.put(answer)))
        answer, reason = done.get(timeout=30)
        assert done.empty()
        assert server.asked <= LIMIT + 8 * len(bad)  # a parameter that is refused is asked without at once
        assert (answer is None) == bool(reason)
        assert "\n" not in reason
        if answer is None:
            assert "127.0.0.1" in reason or "deadline_s" in reason
        else:
            read(answer)
            answer.encode()

    look()
    asked.close()
    assert "Traceback" not in capsys.readouterr().err
