"""A judge that speaks OpenAI's chat completions on loopback, whose answers are known and which can be told
to fail.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ASPECTS = ("knowledge", "benevolence", "power", "vitality")
FAULTS = ("429", "500", "reset", "stall", "malformed", "seven", "empty", "nobody")


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def scores(completion: str) -> list[int]:
    """What this judge gives for a final text."""
    return [byte % 6 for byte in digest(completion)[:4]]


def inside(prompt: str, tag: str) -> list[str]:
    return [
        html.unescape(text) for text in re.findall(rf"<{tag}>(.*?)</{tag.split()[0]}>", prompt, re.DOTALL)
    ]


def agreed(said: tuple[list[str], list[str]]) -> bool:
    """Half of the talks agree after a round in which both had something to say."""
    return (
        all(turns and turns[-1].split() for turns in said)
        and digest("\n".join([*said[0], *said[1]]))[0] % 2 == 0
    )


def answer(prompt: str) -> dict[str, Any]:
    completions = inside(prompt, "completion")
    if completions:
        assert len(completions) == 1
        return {**dict(zip(ASPECTS, scores(completions[0]), strict=True)), "reason": "known"}
    said = (inside(prompt, 'turn speaker="1"'), inside(prompt, 'turn speaker="2"'))
    assent = {str(i + 1): said[i][-1].split()[0] for i in (0, 1)} if agreed(said) else {"1": "", "2": ""}
    return {"agreed": agreed(said), "assent": assent}


# the n-th request and its body -> status, body (bytes as they are, else as JSON) and headers
Response = tuple[int, Any, dict[str, str]]
Script = Callable[[int, dict[str, Any]], Response | None]


class JudgeServer(ThreadingHTTPServer):
    """`fault(n, prompt)` names one of FAULTS for the n-th request, or None. `script(n, body)` is a whole
    response, or None. `requests` are the bodies, `heads` the headers, `paths` the paths.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.requests: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.fault: Callable[[int, str], str | None] = lambda n, prompt: None
        self.script: Script | None = None
        self.paths: list[str] = []
        self.answer: Callable[[str], dict[str, Any]] = answer
        self.takes_schema = True
        self.retry_after = "0.01"
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self.end = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.heads.append(dict(self.headers))
            server.paths.append(self.path)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        self.react(number, body)

    def react(self, number: int, body: dict[str, Any]) -> None:
        server, prompt = self.server, body["messages"][0]["content"]
        time.sleep(server.delay)
        response = server.script(number, body) if server.script else None
        if response is not None:
            return self.reply(*response)
        if self.path != "/v1/chat/completions":
            return self.reply(404, {"error": "no such path"})
        if "response_format" in body and not server.takes_schema:
            return self.reply(422, {"error": "Unexpected fields in the request: response_format"})
        fault, said = server.fault(number, prompt), server.answer(prompt)
        if fault == "429":
            return self.reply(429, {"error": "slow down"}, {"Retry-After": server.retry_after})
        if fault in ("500", "401"):
            return self.reply(int(fault), {"error": f"no: {self.headers.get('Authorization')}"})
        if fault == "reset":
            self.leave()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "stall":
            server.end.wait(30)
        if fault == "seven" and "power" in said:
            said["power"] = 7
        if fault == "nobody" and "agreed" in said:
            said = {"agreed": True, "assent": {"1": "words that nobody said", "2": "words that nobody said"}}
        content = {"malformed": json.dumps(said)[:-1], "empty": ""}.get(fault or "", json.dumps(said))
        return self.reply(200, {"choices": [{"message": {"role": "assistant", "content": content}}]})

    def leave(self) -> None:
        with self.server.lock:
            self.server.at_once -= 1

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.leave()  # before the client can know
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[JudgeServer]:
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        thread.join()
        server.server_close()
