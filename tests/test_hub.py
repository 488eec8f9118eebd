"""`--model ORG/NAME`, by huggingface_hub from a server on loopback: what is fetched, and that the commit
stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from duologue.grpo.cli import main
from duologue.grpo.config import load_config
from duologue.grpo.unsaid import pinned_of
from duologue.model.hub import is_name, is_pinned, local, pinned

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST, SECOND = "1" * 40, "2" * 40
NAME = "org/tiny-chat"
RUN = [
    "train", "deal", "--model", NAME, "imitation.steps=0", "grpo.group_size=2", "grpo.groups_per_step=1",
    "dialogue.max_rounds=1", "dialogue.max_tokens_per_turn=4", "dialogue.max_tokens_final=80",
    "eval.dialogues=1", "eval.partners=[]", "opponent.kind=self", "rollout.cache_tokens=32768", "lora.rank=2",
]  # fmt: skip
PROGRAM = """
import sys
from duologue.grpo.cli import main
steps, run, *rest = sys.argv[1:]
sys.exit(main([*rest, f"train.steps={steps}", "--run-dir", run]))
"""


class Hub(ThreadingHTTPServer):
    """The parts of the Hub's API by which a model is found and fetched; `asked` are paths."""

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.newest = folders, FIRST
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for commit, folder in self.server.folders.items():
            files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
            if path == f"/api/models/{NAME}/tree/{commit}":
                listed = [
                    {"type": "file", "path": name, "oid": digest(file), "size": file.stat().st_size}
                    for name, file in files.items()
                ]
                return self.answer(json.dumps(listed).encode())
            name = path.removeprefix(f"/{NAME}/resolve/{commit}/")
            if name in files:
                headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(files[name])}"'}
                return self.answer(files[name].read_bytes(), headers)
        if path.startswith(f"/api/models/{NAME}"):
            return self.answer(json.dumps({"id": NAME, "sha": self.server.newest, "siblings": []}).encode())
        return self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, code=404)

    def answer(self, body: bytes, headers: dict[str, str] | None = None, code: int = 200) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(chat_checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    """Two commits of a model, of which the first is the newest, and beside it what nobody needs."""
    folders = {commit: tmp_path / commit for commit in (FIRST, SECOND)}
    for folder in folders.values():
        shutil.copytree(chat_checkpoint, folder)
        (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
        (folder / "onnx").mkdir()
        for other in ("onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "consolidated.safetensors"):
            (folder / other).write_bytes(b"x")
    weights = folders[SECOND] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    server = Hub(folders)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def duologue(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    program = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(program, env=env, capture_output=True, text=True, timeout=400, check=False)


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub, tmp_path: Path) -> None:
    home, run = tmp_path / "home", tmp_path / "run"
    done = duologue(hub, home, "1", str(run), *RUN)
    assert done.returncode == 0, done.stderr
    assert load_config(str(run / "config.toml")).model.path == f"{NAME}@{FIRST}"
    fetched = {path.rpartition("/")[2] for path in hub.asked if f"/resolve/{FIRST}/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= fetched
    assert not fetched & {"model.onnx", "pytorch_model.bin", "consolidated.safetensors"}
    assert not any("onnx" in path for path in hub.asked)
    hub.newest = SECOND  # somebody pushed other weights
    done = duologue(hub, home, "2", str(run), *RUN, "--resume")
    assert done.returncode == 0, done.stderr
    assert load_config(str(run / "config.toml")).model.path == f"{NAME}@{FIRST}"
    assert not any(SECOND in path for path in hub.asked)


@contextlib.contextmanager
def asking(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        yield


def test_names_are_pinned_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with asking(hub.url, monkeypatch):
        assert pinned(NAME) == f"{NAME}@{FIRST}"
        hub.newest = SECOND
        assert pinned(NAME) == f"{NAME}@{SECOND}"
        asked = len(hub.asked)
        assert pinned(f"{NAME}@{FIRST}") == f"{NAME}@{FIRST}"
        (tmp_path / "org" / "tiny-chat").mkdir(parents=True)
        for place in (NAME, "", "/somewhere/else", "runs/mine/checkpoints", "a b/c", "alone"):
            assert pinned(place) == place
            assert not is_pinned(place)
            assert not is_name(place)
            assert local(place) == Path(place)
        assert len(hub.asked) == asked
    (tmp_path / "config.toml").write_text(load_config("deal", [f"model.path=org/x@{FIRST}x"]).to_toml())
    assert pinned_of("", tmp_path) == ""
    (tmp_path / "config.toml").write_text(
        load_config("deal").to_toml().replace('path = ""', f'path = "org/x@{FIRST}"', 1)
    )
    assert pinned_of("org/x", tmp_path) == f"org/x@{FIRST}"


def test_what_the_hub_does_not_give_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "deal", "--run-dir", str(tmp_path / "run"), "--model"]
    with asking(hub.url, monkeypatch):
        assert main([*words, "org/unknown"]) == 2
        assert (
            "model.path = 'org/unknown': there is no such folder, and the Hub does not give it"
            in capsys.readouterr().err
        )
    with asking("http://127.0.0.1:1", monkeypatch):
        assert main([*words, "org/unknown"]) == 2
        said = capsys.readouterr().err
        assert "the Hub does not give it" in said
        assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_describes_a_model_comes_before_its_weights(hub: Hub, tmp_path: Path) -> None:
    """A run that does not fit says so before gigabytes are fetched."""
    for folder in hub.folders.values():
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(
            json.dumps(config | {"hidden_size": 2**20, "intermediate_size": 2**24}), "utf-8"
        )
    done = duologue(hub, tmp_path / "home", "1", str(tmp_path / "run"), *RUN)
    assert done.returncode == 1, done.stderr
    assert "the run needs" in done.stderr
    assert any(path.endswith("config.json") for path in hub.asked)
    assert not any(path.endswith(".safetensors") for path in hub.asked)


def test_an_adapter_names_its_base_in_the_hub_and_finds_it_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do its card and peft's revision. Without the Hub, by what is cached of it."""
    from huggingface_hub import constants

    home, run, out = tmp_path / "home", tmp_path / "run", tmp_path / "out"
    done = duologue(hub, home, "1", str(run), *RUN)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    local.cache_clear()
    assert pinned(NAME) == f"{NAME}@{FIRST}"
    assert main(["export", str(run), str(out)]) == 0
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    kept = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (kept["base_model_name_or_path"], kept["revision"]) == (NAME, FIRST)
    for folder in (out, tmp_path / "merged"):
        card = (folder / "README.md").read_text("utf-8")
        assert f'base_model: "{NAME}"\n' in card
        assert f"began with `{NAME}` (commit {FIRST})" in card
        assert str(home) not in card
    with pytest.raises(ValueError, match="the Hub does not give it"):
        pinned("org/unknown")
    told = tmp_path / "told.jsonl"
    words = ["eval", NAME, "--recipe", "deal", *RUN[7:], "--save-dialogues", str(told)]
    assert main([word for word in words if "partners" not in word and "lora" not in word]) == 0
    assert "You and another person" in told.read_text("utf-8")
