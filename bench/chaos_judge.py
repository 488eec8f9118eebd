"""A run of bench/chaos.py whose outcomes a judge scores: its texts, and the judge, a process of its own whose
answers follow from what it is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import re
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ASPECTS = ("knowledge", "benevolence", "power", "vitality")
RUN = [
    "collective-agency",
    "rollout.cache_tokens=16384",
    "train.save_every=2",
    "train.kl_every=2",
    "train.threads=1",
    "train.tokens_per_microbatch=4000",
    "grpo.group_size=4",
    "grpo.groups_per_step=3",
    "grpo.learning_rate=1e-3",
    "dialogue.max_rounds=1",
    "dialogue.max_tokens_per_turn=6",
    "dialogue.max_tokens_final=6",
    "judge.deadline_s=300",
    "eval.dialogues=4",
    "eval.partners=[]",
]


def answer(prompt: str) -> dict[str, Any]:
    """Scores by the digest of what was resolved; of two who said something, that they agree."""
    digest = hashlib.sha256(prompt.encode()).digest()
    if "<completion>" in prompt:
        return {**{aspect: digest[i] % 6 for i, aspect in enumerate(ASPECTS)}, "reason": "known"}
    assent = {}
    for speaker in "12":
        turns = re.findall(rf'<turn speaker="{speaker}">(.*?)</turn>', prompt, re.DOTALL)
        words = html.unescape(turns[-1]).split() if turns else []
        assent[speaker] = words[0] if words else ""
    agreed = all(assent.values())
    return {"agreed": agreed, "assent": assent if agreed else dict.fromkeys(assent, "")}


class Handler(BaseHTTPRequestHandler):
    """Answers a question with what `answer` makes of its text."""

    protocol_version = "HTTP/1.1"
    answer = staticmethod(answer)

    def log_message(self, *_: Any) -> None:
        return

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = json.dumps(self.answer(body["messages"][0]["content"]))
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        return  # a client that was killed


@contextlib.contextmanager
def judged_run(where: Path, policy: Path) -> Iterator[list[str]]:
    """The settings of the run, while its judge answers."""
    pair = {
        "first": {"name": "kind", "instructions": "be kind ."},
        "second": {"name": "brave", "instructions": "be brave ."},
    }
    texts = {
        "dilemmas": [{"id": f"d{i}", "text": f"who says {i} ?"} for i in range(4)],
        "personas": [{"id": "p", **pair}],
        "tasks": [{"id": f"t{i}", **pair, "text": f"who has {i} ?"} for i in range(4)],
    }
    files = []
    for key, rows in texts.items():
        path = where / f"{key}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files.append(f"game.{key}={path}")
    server = Server(("127.0.0.1", 0), Handler)
    pid = os.fork()
    if pid == 0:
        server.serve_forever()
    server.socket.close()
    url = f"judge.url=http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield [*RUN, f"model.path={policy}", url, *files]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
