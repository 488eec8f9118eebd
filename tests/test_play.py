"""`duologue play`: a person in a real terminal and on a pipe; the outcome is what the game's rules say of
the words on the screen.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import random
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from duologue.grpo.cli import main
from duologue.grpo.commands.aloud import Wrapped
from duologue.grpo.commands.play import Terminal
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Branch, Engine
from duologue.rollout.engine.sequence import SamplingParams
from duologue.rollout.games.catalogue import GAMES
from duologue.rollout.seeds import derive_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from test_cli import TINY
from test_collective import PAIRS, TASKS, checkpoint_dir

__all__ = ["checkpoint_dir"]
COMMAND = [sys.executable, "-c", "import sys; from duologue.grpo.cli import main; sys.exit(main())", "play"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Said = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "deal", *TINY, "train.steps=1", "--run-dir", str(path)]) == 0
    return next((path / "checkpoints").glob("step_*"))


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """person(lines, *words) -> what the screen shows."""

    def play(lines: list[str], *words: object) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        assert main(["play", *map(str, words)]) == 0
        return capsys.readouterr().out

    return play


def scenario_of(name: str, seed: int) -> tuple[object, object]:
    game = GAMES[name]()
    return game, game.sample(random.Random(derive_seed(seed, "play")), "heldout")


def test_a_closed_talk_has_the_outcome_of_the_rules(checkpoint: Path, person: Said) -> None:
    for seed in range(4):
        game, scenario = scenario_of("deal", seed)
        counts = scenario.data.counts
        zero = game.statement([0] * 3)
        lines = [
            "hello there",
            "fine <selection>",
            "all of it",
            game.statement([n + 1 for n in counts]),
            zero,
        ]
        shown = person(lines, checkpoint, "--seed", seed)
        assert scenario.private_text[0] in shown
        stated = re.search(r"policy states> (.*)", shown)
        assert stated is not None
        assert shown.count("is no selection here: accepted is 'book N hat N ball N'") == 2
        outcome = game.judge(scenario, (zero, stated[1].strip()))
        end = "Agreed" if outcome.agreed else f"No deal ({outcome.failure})"
        assert f"{end}: you score {outcome.scores[0]:g}, the policy {outcome.scores[1]:g}." in shown
        assert shown.index("No deal" if not outcome.agreed else "Agreed") < shown.index(
            scenario.private_text[1]
        )


def test_private_words_stay_private_until_the_end(checkpoint: Path, person: Said) -> None:
    _, scenario = scenario_of("deal", 1)
    shown = person(["/private", "/help", "/nonsense", "/quit"], checkpoint, "--seed", "1", "--side", "second")
    assert shown.count(scenario.private_text[1]) == 2
    assert scenario.private_text[0] not in shown
    assert shown.count("/quit leaves") == 3
    assert shown.strip().endswith("You left; nothing is agreed.")


def test_other_games_and_bad_input(
    checkpoint: Path, person: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = person(["/done", "price one", "walk away"], checkpoint, "--game", "price")
    assert "'price N' with N from 0 to 99, or 'walk away'" in shown
    assert "No deal (walk_away)" in shown
    shown = person(["x " * 3000, "/quit"], checkpoint)
    assert "too long for this policy" in shown
    (tmp_path / "lonely").mkdir()
    for words, message in (
        (["play", str(tmp_path / "lonely")], "lies in no run directory, accepted is a recipe's name"),
        (["play", str(tmp_path / "lonely"), "--game", "deal"], "is not a checkpoint"),
        (["play", str(checkpoint), "--game", "chess"], "chess"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_the_temperature_of_the_policy(
    checkpoint: Path, person: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, fixed = ["hello", "and now?"], ["dialogue.first_speaker=alternate", "--seed", "5"]
    greedy, nearly, warm = (
        person(lines, checkpoint, *fixed, *more)
        for more in (["--temperature", "0"], ["dialogue.temperature=1e-6"], [])
    )
    assert "policy> " in greedy
    assert greedy == nearly != warm
    for bad in ("-1", "nan", "inf"):
        assert main(["play", str(checkpoint), "--temperature", bad]) == 2
        assert "accepted is a finite number from 0" in capsys.readouterr().err


def test_who_speaks_first_is_as_in_training(checkpoint: Path, person: Said) -> None:
    for seed in range(3):
        for side in ("first", "second"):
            shown = person(
                ["/quit"], checkpoint, "dialogue.first_speaker=first", "--side", side, "--seed", seed
            )
            assert ("policy> " in shown) == (side == "second")


def test_with_a_full_context_the_talk_can_still_be_closed(checkpoint: Path, person: Said) -> None:
    words = ["so " * n for n in (200, 100, 50, 25, 12, 6)] * 3
    shown = person([*words, "/done", "book 0 hat 0 ball 0"], checkpoint, "dialogue.max_rounds=9")
    assert shown.count("too long") > 6
    assert "you score" in shown


def test_escape_sequences_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal("").say("a\x1b[2J\x07\nb\x9bc")
    assert capsys.readouterr().out == "a[2J\nbc\n"


@pytest.fixture
def dilemma(tmp_path: Path) -> list[str]:
    files = []
    for key, rows in (("dilemmas", TASKS), ("personas", PAIRS), ("tasks", TASKS)):
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"game.{key}={tmp_path / key}.jsonl")
    return [
        "--game",
        "collective-agency",
        *files,
        "dialogue.max_tokens_per_turn=8",
        "dialogue.max_tokens_final=9",
        "rollout.cache_tokens=16384",
    ]


@pytest.mark.parametrize("context", ["full", "last_2"])
def test_the_policy_hears_a_dilemma_as_in_training(
    context: str,
    checkpoint_dir: Path,
    person: Said,
    dilemma: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contexts: list[str] = []
    folder = shutil.copytree(checkpoint_dir, tmp_path / "plain")
    (folder / "chat_template.jinja").write_text(CHATML)  # Qwen3's own drops thoughts from what went before
    tokenizer, started = Tokenizer.from_dir(folder), Engine.start

    def spy(engine: Engine, branch: Branch, params: SamplingParams) -> object:
        contexts.append(tokenizer.decode(branch.token_ids))
        return started(engine, branch, params)

    monkeypatch.setattr(Engine, "start", spy)
    settings = ["dialogue.first_speaker=first", f"dialogue.context={context}", "dialogue.max_rounds=3"]
    shown = person(
        ["I would mend it.", "x " * 9000, "Halve the cost.", "We agree."], folder, *dilemma, *settings
    )
    assert shown.count("too long for this policy") == 1
    *_, second, third, final = contexts
    assert len(contexts) == 4
    assert "I would mend it." in final
    assert ("I would mend it." in second, "I would mend it." in third) == (
        (True, True) if context == "full" else (False, False)
    )
    assert "Halve the cost." in third or context == "last_2"
    assert "We agree." in third


def test_a_dilemma_is_talked_over_and_resolved(
    checkpoint_dir: Path, person: Said, dilemma: list[str]
) -> None:
    lines = ["I would mend it.", "Then let us halve the cost.", "/done"]
    shown = person(lines, checkpoint_dir, *dilemma)
    task = next(row for row in TASKS if str(row["text"]) in shown)
    assert f"{task['second']['name']}> " in shown
    assert "The resolution, as the policy writes it:" in shown


def test_in_a_real_terminal(checkpoint: Path) -> None:
    ours, theirs = pty.openpty()
    wide = {**os.environ, "COLUMNS": "100"}
    process = subprocess.Popen(
        [*COMMAND, str(checkpoint)], stdin=theirs, stdout=theirs, stderr=theirs, env=wide
    )
    os.close(theirs)
    screen, typed, ends = "", 0, time.monotonic() + 240
    replies = [("you> ", "good day\n"), ("you> ", "/done\n"), ("your selection> ", "book 0 hat 0 ball 0\n")]
    while time.monotonic() < ends:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            screen += data.decode()
        if typed < len(replies) and screen.endswith(replies[typed][0]):
            os.write(ours, replies[typed][1].encode())
            screen += "\n"
            typed += 1
    assert process.wait(timeout=240) == 0, screen
    os.close(ours)
    assert typed == 3
    assert "you score" in screen


def test_on_a_pipe_that_ends(checkpoint: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(checkpoint)], input="good day\n", capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("You left; nothing is agreed.")


# ---- words as they are sampled -----------------------------------------------------------------------------


class Screen:
    """A pseudo-terminal in this process: what is typed into it, and all that it shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
        self._ours, self.theirs = pty.openpty()
        self._shown: list[bytes] = []
        monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(self.theirs), "r"))
        monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(self.theirs), "w"))
        os.write(self._ours, typed.encode())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._ours, 4096):
                self._shown.append(data)

    def text(self) -> str:
        sys.stdin.close()
        sys.stdout.close()
        os.close(self.theirs)
        self._reader.join()
        os.close(self._ours)
        return re.sub(r"\x1b\[[0-9;]*m|\r", "", b"".join(self._shown).decode())


def test_words_appear_on_a_terminal_as_they_are_sampled(
    checkpoint: Path, person: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["good day", "and you?", "/quit"]
    words = [checkpoint, "dialogue.max_tokens_per_turn=90", "--seed", "3", "dialogue.first_speaker=first"]
    plain = person(lines, *words)
    step, mark = Engine.step, "\x1e"

    def marked(engine: Engine) -> object:
        done = step(engine)
        os.write(screen.theirs, mark.encode())
        return done

    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        patch.setenv("TERM", "xterm")
        patch.setattr(Engine, "step", marked)
        screen = Screen(patch, "".join(line + "\n" for line in lines))
        code = main(["play", *map(str, words)])
        shown = screen.text()
    assert code == 0
    turns = re.findall(r"(?s)policy> (.*?)\nyou> ", shown)
    expected = re.findall(r"(?s)policy> (.*?)\nyou> ", plain)
    assert len(turns) == len(expected) > 0
    assert sum(len(re.findall(rf"\S {mark}+\S|\S{mark}+ ", turn)) for turn in turns) > 5
    for turn, whole in zip(turns, expected, strict=True):
        assert "".join(turn.replace(mark, "").split()) == "".join(whole.split())
        assert all(len(line) <= 40 or " " not in line for line in turn.replace(mark, "").split("\n"))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    st.text(alphabet="ab é日本\n 😀\u0301", max_size=60), st.lists(st.integers(0, 200)), st.integers(3, 12)
)
def test_text_in_pieces_is_shown_once_in_whole_words(text: str, cuts: list[int], width: int) -> None:
    data, out = text.encode(), list[str]()
    screen = Wrapped(out.append, width)
    for cut in sorted(cuts):
        screen.show(data[:cut].decode("utf-8", "replace"))
        shown = "".join(out)
        assert "\ufffd" not in shown
        assert text.replace(" ", "").replace("\n", "").startswith(shown.replace(" ", "").replace("\n", ""))
    screen.show(text, whole=True)
    assert "".join("".join(out).split()) == "".join(text.split())
    longest = max((cell_len(word) for word in re.findall(r"[^\s日本]+|[日本]", text)), default=0)
    assert all(cell_len(line.rstrip()) <= max(width, longest) for line in "".join(out).split("\n"))
