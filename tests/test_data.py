"""The texts that ship with the package, their measure of likeness, and `duologue data` with a real HTTP
server.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo.cli import main
from duologue.rollout.games.texts import NEEDS, SHIPPED, TIERS, kind_of, likeness, read, shingles

BOUND = 0.15  # what the shipped texts keep


def shipped(kind: str) -> list[dict[str, Any]]:
    return read(SHIPPED[kind], NEEDS[kind])


def test_the_package_ships_what_the_recipes_need() -> None:
    dilemmas, personas, conflicts, questions = (shipped(kind) for kind in NEEDS)
    assert [len(x) for x in (dilemmas, personas, conflicts, questions)] == [1100, 25, 100, 100]
    assert all(kind_of(SHIPPED[kind]) == kind for kind in NEEDS)
    for tier in TIERS:
        rows = [row for row in dilemmas if row["tier"] == tier]
        assert len(rows) >= 366
        assert len({row["situation"] for row in rows}) >= 110
        assert sum(row["tier"] == tier for row in conflicts) >= 33
    assert all(25 <= len(row["text"].split()) <= 85 for row in (*dilemmas, *conflicts))
    assert all(row["tags"] for row in (*dilemmas, *personas, *conflicts, *questions))
    names = [row[side]["name"] for row in personas for side in ("first", "second")]
    assert len(set(names)) == 50
    openings = Counter(" ".join(row["text"].split()[:2]) for row in dilemmas)
    assert max(openings.values()) < 0.05 * len(dilemmas), "openings vary"
    assert "CC0" in (SHIPPED["dilemmas"].parent / "LICENSE.md").read_text("utf-8")


def test_no_two_texts_are_alike_within_or_between_training_and_held_out() -> None:
    texts = [row["text"] for kind in ("dilemmas", "conflicts", "questions") for row in shipped(kind)]
    found = {(i, j): value for value, i, j in likeness(texts)}
    assert max(found.values()) <= BOUND
    rng = random.Random(0)
    for i, j in rng.sample(list(found), 200) + [
        tuple(sorted(rng.sample(range(len(texts)), 2), reverse=True)) for _ in range(200)
    ]:
        a, b = shingles(texts[i]), shingles(texts[j])  # the definition, pair by pair
        assert found.get((i, j), 0.0) == len(a & b) / len(a | b)


def test_likeness_sees_a_copy_with_a_changed_name() -> None:
    texts = [row["text"] for row in shipped("dilemmas")[:50]]
    words = texts[7].split()
    words[3] = "Xaver"
    (value, i, j), *_ = sorted(likeness([*texts, " ".join(words)]), reverse=True)
    assert (i, j) == (50, 7)
    assert value > 0.8


BAD = [
    ('{"id": "a", "text": "x"}\nnonsense', "line 2: accepted is a JSON object with id, text"),
    ('["id", "text"]', "line 1: accepted is a JSON object"),
    ('{"id": "a"}', "accepted is a JSON object with id, text"),
    ('{"id": "a", "text": ""}', "accepted is a JSON object with id, text"),
    ('{"id": 4, "text": "x"}', "id = 4, accepted is text"),
    ('{"id": "a", "text": ["x"]}', "accepted is text"),
    ('{"id": "a", "text": "x"}\n\n{"id": "a", "text": "y"}', "line 3: id = 'a' stands in line 1 too"),
    (
        '{"id": "a", "text": "x", "tier": "low"}',
        "tier = 'low', accepted is one of high_stakes, interpersonal, everyday",
    ),
    ('{"id": "a", "text": "x", "tags": "money"}', "tags = 'money', accepted is a list of words"),
    (
        '{"id": "a", "text": "x", "first": {"name": "A"}}',
        "first = .*, accepted is an object with name and instructions",
    ),
    ("\n", "is empty"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "own.jsonl", NEEDS["dilemmas"])


# ---- the command -------------------------------------------------------------------------------------------


def test_list_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--tier", "everyday", "--tag", "honesty", "--json", "--limit", "0"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        row for row in shipped("dilemmas") if row["tier"] == "everyday" and "honesty" in row["tags"]
    ]
    assert rows
    situation = rows[0]["situation"]
    assert main(["data", "list", "--situation", situation]) == 0
    text = capsys.readouterr().out
    assert f"everyday/{situation}/1" in text
    assert main(["data", "list", "--kind", "personas", "--limit", "1"]) == 0
    assert "1 of 25 personas; --limit 0 shows all" in capsys.readouterr().out
    assert main(["data", "list", "--limit", "-1"]) == 2


def test_check_from_a_shell(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from duologue.grpo.cli import main; sys.exit(main())",
        "data",
        "check",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "high_stakes 367 (133)" in done.stdout
    own = tmp_path / "own.jsonl"
    first, second = (row["text"] for row in shipped("dilemmas")[:2])
    copy = first.replace(first.split()[5], "another", 1)
    rows = ({"id": str(i), "text": text, "tier": "everyday"} for i, text in enumerate((first, second, copy)))
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([*command, str(own)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "too much alike" in done.stdout
    assert "own.jsonl: 0 and own.jsonl: 2" in " ".join(done.stdout.split())


@contextmanager
def model_server(replies: list[tuple[int, str]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Gives one reply after the other, the last one for ever: (status, text)."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = replies[min(len(asked), len(replies) - 1)]
            asked.append({**body, "authorization": self.headers.get("Authorization")})
            data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def story(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(50))


def test_write_refuses_copies_and_keeps_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOGUE_JUDGE_KEY", "secret-of-mine")
    out = tmp_path / "more.jsonl"
    out.write_text(json.dumps({"id": "mine", "text": "What I wrote.", "tier": "everyday"}) + "\n")
    known = shipped("dilemmas")[0]["text"]
    replies = [
        (429, ""),
        (200, known),
        (200, story(1)),
        (200, story(1)),
        (200, "too short"),
        (500, ""),
        (200, story(2)),
    ]
    with model_server(replies) as (url, asked):
        command = ["data", "write", "--url", url, "--tier", "everyday", "--count", "2", "--out", str(out)]
        assert main(command) == 0
        rows = read(out, NEEDS["dilemmas"])
        assert [row["text"] for row in rows] == ["What I wrote.", story(1), story(2)]
        assert [row["id"] for row in rows[1:]] == ["everyday/written/1", "everyday/written/2"]
        assert len(asked) == len(replies)
        assert asked[0]["authorization"] == "Bearer secret-of-mine"
        assert "everyday" in asked[0]["messages"][0]["content"]
        assert "2 dilemmas written, 3 refused" in " ".join(capsys.readouterr().out.split())
    assert "secret" not in out.read_text()


def test_write_says_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "more.jsonl"
    with model_server([(200, story(3)), (401, "")]) as (url, _):
        command = ["data", "write", "--url", url, "--tier", "everyday", "--out", str(out)]
        assert main([*command, "--count", "2"]) == 1
        assert "gave no dilemma: HTTP 401; what was written before is in" in capsys.readouterr().err
        assert len(read(out, NEEDS["dilemmas"])) == 1
        assert main([*command, "--count", "0"]) == 2
        out.write_text("not a file of texts")
        assert main([*command, "--count", "1"]) == 2
        assert out.read_text() == "not a file of texts"


def test_variations_of_a_situation_do_not_copy_each_other() -> None:
    by_situation: dict[str, list[str]] = {}
    for row in shipped("dilemmas"):
        by_situation.setdefault(row["tier"] + row["situation"], []).append(row["text"])
    for texts in by_situation.values():
        for a, b in itertools.combinations(map(shingles, texts), 2):
            assert len(a & b) <= 0.1 * len(a | b)
