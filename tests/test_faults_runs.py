"""What can happen to a run's files, texts and settings: noticed before training goes on, named, with a way
on."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from duologue.grpo import steps
from duologue.grpo.cli import main
from duologue.grpo.commands import players
from duologue.grpo.commands.play import Terminal
from duologue.grpo.config import load_config
from duologue.grpo.run_dir import RunDir, read_lines
from duologue.grpo.update import UpdateStats
from duologue.rollout.games.template import load_template
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import TINY_DEAL


def older(run: Path) -> Path:
    """A run of the time before checksums: what was changed in a checkpoint is found by its reader."""
    for file in run.rglob("checksums.json"):
        file.unlink()
    return run


def train(path: Path, *more: str) -> int:
    return main(["train", "deal", "--run-dir", str(path), *TINY_DEAL, "imitation.steps=1", *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step of imitation and two of self-play, with a checkpoint after each."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train(path) == 0
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file): file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != ".lock"
    }


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("duologue: ")
    return error


# ---- lines that were cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "dialogues.jsonl"])
@pytest.mark.parametrize("lost", [1, 20, 10**9])
def test_lines_that_are_shorter_than_the_checkpoint_knows(
    run: Path, name: str, lost: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[: max(0, len(data) - lost)])
    assert train(run, "--resume", "train.steps=3") == 0
    shown = capsys.readouterr().out
    assert f"{run / name} ends before what" in shown
    assert "step_000003" in shown
    for line in (run / name).read_bytes().splitlines():
        assert isinstance(json.loads(line), dict)
    assert read_lines(run / name)[-1]["step"] >= 3
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert main(["report", str(run)]) == 0


def test_a_missing_file_of_lines_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    assert train(run, "--resume", "train.steps=3") == 0
    assert "metrics.jsonl ends before what" in capsys.readouterr().out
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("how", ["damaged", "twice", "retyped"])
def test_a_line_that_is_damaged_or_doubled_is_refused(
    run: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = {"damaged": b"\0" * len(lines[1]) + b"\n", "twice": lines[0], "retyped": b"[1]\n"}[how]
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    before = contents(run)
    capsys.readouterr()
    assert train(run, "--resume", "train.steps=3") == 2
    assert f"{run / 'metrics.jsonl'} line 2 is" in said(capsys)
    assert contents(run) == before


# ---- what may differ ---------------------------------------------------------------------------------------


def test_a_resume_with_settings_that_cannot_change_the_result(run: Path) -> None:
    toml = (run / "config.toml").read_text("utf-8")
    line = next(line for line in toml.splitlines() if line.startswith("dual_clip"))
    (run / "config.toml").write_text(toml.replace(line + "\n", ""), "utf-8")  # as of an older version
    more = ["train.threads=2", "train.tokens_per_microbatch=8192", "rollout.cache_tokens=8192"]
    judge = ["judge.deadline_s=20", "judge.timeout_s=9", "judge.concurrency=3"]
    assert train(run, "--resume", "train.steps=3", *more, *judge, "judge.max_unscored_share=1") == 0
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 3


def test_a_resume_with_settings_that_change_the_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    capsys.readouterr()
    more = ["grpo.learning_rate=0.5", "grpo.max_grad_norm=2", "train.threads=2"]
    assert train(run, "--resume", "train.steps=3", *more) == 2
    error = said(capsys)
    assert "was started with grpo.learning_rate = " in error
    assert "not 0.5; grpo.max_grad_norm = 1.0, not 2.0, which can change" in error
    assert "threads" not in error
    assert contents(run) == before


def test_a_judge_may_move_but_not_be_another(tmp_path: Path) -> None:
    judge = ["game.name=dilemma", "judge.backend=endpoint", "judge.model=m", "judge.url=http://127.0.0.1:"]
    opponent = ["opponent.kind=endpoint", "opponent.url=http://127.0.0.1:"]

    def toml(port: int, *more: str) -> str:
        parts = [word + str(port) if word.endswith(":") else word for word in [*judge, *opponent]]
        return load_config("collective-agency", [*parts, *more]).to_toml()

    RunDir.create(tmp_path / "run", toml(8000)).close()
    RunDir.resume(tmp_path / "run", toml(8001, "judge.ledger=elsewhere", "judge.key_env=KEY")).close()
    for key, value in {"judge.model": "n", "judge.temperature": "1", "opponent.model": "n"}.items():
        with pytest.raises(ValueError, match=f"started with {key} = .*, which can change the result"):
            RunDir.resume(tmp_path / "run", toml(8001, f"{key}={value}"))
    cuda = [toml(1, f"model.device={device}") for device in ("cuda:0", "cuda:1", "cpu")]
    RunDir.create(tmp_path / "gpu", cuda[0]).close()
    moved = RunDir.resume(tmp_path / "gpu", cuda[1])
    moved.go_on_from(0)
    moved.close()
    with pytest.raises(ValueError, match=r"model\.device = 'cuda:1', not 'cpu'"):
        RunDir.resume(tmp_path / "gpu", cuda[2])


def test_a_configuration_that_was_cut_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.toml").write_text((run / "config.toml").read_text("utf-8")[:-40] + "= [", "utf-8")
    assert train(run, "--resume", "train.steps=3") == 2
    assert f"{run / 'config.toml'} cannot be read: " in said(capsys)


def test_a_summary_that_was_cut_is_written_anew(run: Path) -> None:
    (run / "summary.json").write_text('{"trai', "utf-8")
    assert train(run, "--resume") == 0
    assert json.loads((run / "summary.json").read_text("utf-8"))["steps"] == 3


def test_a_longer_schedule_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = (run / "config.toml").read_text("utf-8").replace('schedule = "constant"', 'schedule = "cosine"')
    (run / "config.toml").write_text(toml, "utf-8")
    assert train(run, "--resume", "grpo.schedule=cosine", "train.steps=3") == 0
    assert (
        "grpo.schedule = 'cosine' is planned anew for train.steps = 3 in place of 2"
        in capsys.readouterr().out
    )


# ---- damaged checkpoints -----------------------------------------------------------------------------------

HARMS: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = (
    *("config.json", "generation_config.json", "lines.json", "model.safetensors", "optimizer.pt"),
    *("tokenizer.json", "tokenizer_config.json", "trainer_state.json"),
)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    run: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step_000003"
    assert {file.name for file in newest.iterdir()} >= set(FILES)
    for name in FILES:
        copy = run.parent / "copy"
        shutil.copytree(run, copy)
        damaged = copy / "checkpoints" / newest.name
        HARMS[harm](damaged / name)
        before = contents(copy)
        capsys.readouterr()
        assert train(copy, "--resume", "train.steps=3") == 2, name
        error = said(capsys)
        assert f"the checkpoint {damaged} is damaged ({name}: " in error
        assert f"step_000002 is whole: to go on from it, remove {damaged}" in error
        assert contents(copy) == before
        if name == FILES[-1]:
            shutil.rmtree(damaged)
            assert train(copy, "--resume", "train.steps=3") == 0
            assert [row["step"] for row in read_lines(copy / "metrics.jsonl")] == [0, 1, 2, 3]
        shutil.rmtree(copy)


@pytest.mark.parametrize("key", ["step", "seconds", "baseline", "opponents"])
def test_a_state_of_another_type_is_no_traceback(
    run: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "step_000003" / "trainer_state.json"
    state = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({name: value for name, value in state.items() if name != key}), "utf-8")
    assert train(run, "--resume", "train.steps=3") == 2
    assert f"is damaged (trainer_state.json: {key} = None" in said(capsys)
    file.write_text(json.dumps({**state, key: "x"}), "utf-8")
    assert train(run, "--resume", "train.steps=3") == 2
    assert f"is damaged (trainer_state.json: {key} = 'x'" in said(capsys)


@pytest.mark.parametrize("key", ["baseline", "opponents"])
def test_a_state_that_lacks_a_part_is_no_traceback(
    run: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = older(run) / "checkpoints" / "step_000003" / "trainer_state.json"
    state = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**state, key: {}}), "utf-8")
    assert train(run, "--resume", "train.steps=3") == 2
    assert "step_000003 is damaged (trainer_state.json or optimizer.pt: KeyError: " in said(capsys)


@pytest.mark.parametrize("how", ["before", "behind", "flipped", "other"])
def test_an_optimizer_that_is_no_optimizer_is_no_traceback(
    run: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "step_000003" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    flipped = data.replace(b"data.pkl", b"dbta.pkl")
    other = b"PK\x05\x06" + bytes(18)
    harms = {"before": b"x" + data, "behind": data + data, "flipped": flipped, "other": other}
    file.write_bytes(harms[how])
    capsys.readouterr()
    assert train(run, "--resume", "train.steps=3") == 2
    assert "step_000003 is damaged (" in (error := said(capsys))
    assert "optimizer.pt: " in error


@pytest.mark.parametrize("name", ["metrics.jsonl", "dialogues.jsonl"])
@pytest.mark.parametrize("value", ["x", None, 1.5])
def test_lengths_of_another_type_cut_nothing_off(
    run: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "step_000003" / "lines.json"
    noted = json.loads(file.read_text("utf-8"))
    del noted[name]
    for lengths in (noted, {**noted, name: value}):
        file.write_text(json.dumps(lengths), "utf-8")
        before = contents(run)
        capsys.readouterr()
        assert train(run, "--resume", "train.steps=3") == 2
        assert "is damaged (lines.json: accepted is a number of bytes" in said(capsys)
        assert contents(run) == before


def test_a_state_whose_measures_are_null_is_shown(run: Path) -> None:
    file = older(run) / "checkpoints" / "step_000003" / "trainer_state.json"
    state = json.loads(file.read_text("utf-8"))
    nulls = dict.fromkeys(state["warm_start"])
    file.write_text(json.dumps({**state, "warm_start": nulls}), "utf-8")
    assert train(run, "--resume", "train.steps=3") == 0


def test_a_report_names_a_configuration_that_was_cut(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.toml").write_text((run / "config.toml").read_text("utf-8")[:-40] + "= [", "utf-8")
    assert main(["report", str(run)]) == 2
    assert f"{run / 'config.toml'} is not valid TOML: " in said(capsys)


# ---- texts -------------------------------------------------------------------------------------------------

PERSONA = '{"name": "A", "instructions": "be kind"}'
HALF = r"bad \ud83d half emoji"
BAD_TEXTS = {  # the kind, a second line that is no good, what is said of it
    "half in a text": ("dilemmas", f'{{"id": "a", "tier": "everyday", "text": "{HALF}"}}', r"'\ud83d', half"),
    "half in an id": ("dilemmas", '{"id": "\\udc00", "tier": "everyday", "text": "x"}', r"'\udc00', half"),
    "half in a tag": ("dilemmas", f'{{"id": "a", "text": "x", "tags": ["{HALF}"]}}', "'tags' holds "),
    "half in a key": ("dilemmas", f'{{"id": "a", "text": "x", "{HALF}": 1}}', "half of a surrogate pair"),
    "half in instructions": (
        "personas",
        f'{{"id": "a", "first": {PERSONA}, "second": {{"name": "B", "instructions": "{HALF}"}}}}',
        "'second' holds ",
    ),
    "blank text": (
        "dilemmas",
        '{"id": "a", "tier": "everyday", "text": "   "}',
        "text = '   ', accepted is text",
    ),
    "invisible text": ("dilemmas", '{"id": "a", "text": "\\u200b\\ufeff"}', "accepted is text"),
    "blank id": ("dilemmas", '{"id": " ", "text": "x"}', "id = ' ', accepted is text"),
    "blank tag": ("dilemmas", '{"id": "a", "text": "x", "tags": [" "]}', "tags = [' ']"),
    "blank instructions": (
        "personas",
        f'{{"id": "a", "first": {PERSONA}, "second": {{"name": "B", "instructions": "\\n"}}}}',
        "accepted is an object with name and instructions",
    ),
    "blank name": (
        "personas",
        f'{{"id": "a", "first": {PERSONA}, "second": {{"name": " ", "instructions": "x"}}}}',
        "accepted is an object with name and instructions",
    ),
    "deep": ("dilemmas", "[" * 100_000, "accepted is a JSON object"),
}
GOOD = {
    "dilemmas": '{"id": "0", "tier": "everyday", "text": "Should I go?"}',
    "personas": f'{{"id": "0", "first": {PERSONA}, "second": {PERSONA}}}',
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_cannot_be_used_is_refused_by_all_alike(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, line, message = BAD_TEXTS[case]
    file, run_dir = tmp_path / "texts.jsonl", tmp_path / "run"
    file.write_text(f"{GOOD[kind]}\n{line}\n", "ascii")
    training = [
        "train",
        "collective-agency",
        "--run-dir",
        str(run_dir),
        "--model",
        "nowhere",
        f"game.{kind}={file}",
    ]
    listing = ["data", "list", "--kind", kind, "--file", str(file)]
    for command in (["data", "check", str(file)], listing, training):
        assert main(command) == 2
        error = said(capsys) if command[0] == "data" else capsys.readouterr().err
        assert f"duologue: {file} line 2: " in error
        assert message in error
        assert "Traceback" not in error
    assert not run_dir.exists()


def test_nothing_of_a_failed_start_stays(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for model in ("nowhere", "model"):
        where = str(tmp_path / model)
        assert train(tmp_path / "run", "--model", where) in (1, 2)
        assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", "train.steps=0", "eval.dialogues=1") == 0


def test_byte_order_marks_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.jsonl"
    line = '{"id": "%s", "tier": "everyday", "text": "caf\u00e9 %s"}\r\n'
    file.write_text("\ufeff" + line % (1, 1) + line % (2, 2) + "\ufeff" + line % (3, 3), "utf-8")
    assert main(["data", "list", "--file", str(file), "--json"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["caf\u00e9 1", "caf\u00e9 2", "caf\u00e9 3"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("\ufeff[train]\nsteps = 3\n", "utf-8")
    assert main(["config", str(recipe), "train"]) == 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis"])
def test_other_encodings_are_refused(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\u65e5\u672c" if encoding == "shift_jis" else "caf\u00e9"
    file = tmp_path / "texts.jsonl"
    file.write_bytes((GOOD["dilemmas"].replace("go", text) + "\n").encode(encoding))
    for command in (["data", "check", str(file)], ["data", "list", "--file", str(file)]):
        assert main(command) == 2
        error = said(capsys)
        assert f"{file} line 1 " in error
        assert "accepted is UTF-8" in error


def test_prompts_are_texts_too(tmp_path: Path) -> None:
    for data in (b"\xef\xbb\xbfIt is {x}", b"It is {x}"):
        (tmp_path / "a.txt").write_bytes(data)
        assert load_template(str(tmp_path), tmp_path, "a", {"x"}, {"x"}) == "It is {x}"
    (tmp_path / "a.txt").write_bytes("It is {x}".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt line 1 is not UTF-8 .*: accepted is UTF-8"):
        load_template(str(tmp_path), tmp_path, "a", {"x"}, {"x"})


# ---- numbers that are not finite ---------------------------------------------------------------------------


def null_all(value: Any) -> Any:
    """A record whose every number with a point is null."""
    if isinstance(value, dict):
        return {key: null_all(item) for key, item in value.items()}
    if isinstance(value, list):
        return [null_all(item) for item in value]
    return None if isinstance(value, float) else value


@pytest.mark.parametrize("names", [["dialogues.jsonl"], ["metrics.jsonl"], ["summary.json"], []])
def test_a_report_of_nulls_is_written(run: Path, names: list[str]) -> None:
    everything = ["dialogues.jsonl", "metrics.jsonl", "summary.json"]
    for name in names or everything:
        text = (run / name).read_text("utf-8")
        rows = [text] if name == "summary.json" else text.splitlines()
        nulls = [json.dumps(null_all(json.loads(row))) for row in rows]
        (run / name).write_text("\n".join(nulls) + "\n", "utf-8")
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "Traceback" not in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize("key", ["stage", "step", "turns", "outcome", "scenario", "reward"])
def test_a_report_of_lines_that_lack_a_key_is_no_traceback(
    run: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dialogues.jsonl", "metrics.jsonl"):
        rows = [{k: v for k, v in row.items() if k != key} for row in read_lines(run / name)]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert f"{run} holds lines that are no run's" in said(capsys)


@pytest.fixture
def broken(run: Path) -> Path:
    """A checkpoint whose last norm is NaN."""
    path = older(run) / "checkpoints" / "step_000003"
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_weights_that_are_not_finite_end_the_command(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    evaluation = ["eval", str(broken), "--recipe", "deal", *TINY_DEAL]
    training = ["train", "deal", "--run-dir", str(tmp_path / "new"), *TINY_DEAL, "--model", str(broken)]
    old = ["--run-dir", str(broken.parent.parent), "--resume", "imitation.steps=1"]
    going_on = ["train", "deal", *TINY_DEAL, *old]
    for command in (evaluation, training, [*training, "imitation.steps=0"], [*going_on, "train.steps=3"]):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        assert main(command) in (1, 2)
        assert not (tmp_path / "new" / "metrics.jsonl").exists()
        error = said(capsys)
        assert "finite" in error or "nan" in error.lower()


@pytest.mark.parametrize("name", ["loss", "entropy", "kl_old"])
def test_an_update_that_is_not_finite_ends_the_run(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def update(*_: Any, **__: Any) -> UpdateStats:
        return UpdateStats(**{name: float("nan")}, trained_tokens=1)

    monkeypatch.setattr(steps, "accumulate_policy_gradient", update)
    capsys.readouterr()
    assert train(run, "--resume", "train.steps=3", "train.max_bad_updates=1") == 1
    error = said(capsys)
    assert error.startswith(f"duologue: step 3: {name} is nan, by dialogues ")
    assert error.endswith("train.max_bad_updates = 1; the weights are as before them\n")
    last = read_lines(run / "metrics.jsonl")[-1]
    assert (last["step"], last["bad_updates"]) == (3, 1)


def test_measures_of_an_evaluation_are_json(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*given: Any) -> tuple[dict[str, float], list[Any]]:
        metrics, dialogues = measure(*given)
        return {**metrics, "odd": float("nan")}, dialogues

    measure = players.evaluate
    monkeypatch.setattr(players, "evaluate", evaluate)
    file = tmp_path / "measures.json"
    checkpoint = str(run / "checkpoints" / "step_000003")
    assert main(["eval", checkpoint, "--recipe", "deal", *TINY_DEAL, "--json", str(file)]) == 0
    assert "NaN" not in file.read_text("utf-8")
    assert json.loads(file.read_text("utf-8"))["odd"] is None


# ---- play --------------------------------------------------------------------------------------------------


def test_a_run_is_played_by_its_last_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for path in (run, run / "checkpoints" / "step_000003"):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/done\n/quit\n"))
        capsys.readouterr()
        assert main(["play", str(path), "--seed", "3"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_play_lists_the_games(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lonely = tmp_path / "lonely"
    shutil.copytree(run / "checkpoints" / "step_000003", lonely)
    shutil.rmtree(run)
    capsys.readouterr()
    assert main(["play", str(lonely)]) == 2
    error = said(capsys)
    for game in ("collective-agency", "deal", "price", "priorities"):
        assert game in error


def test_words_are_wrapped_in_a_terminal_alone() -> None:
    words = "negotiation " * 30
    for is_terminal in (True, False):
        terminal, screen = Terminal(""), io.StringIO()
        terminal.console = Console(file=screen, width=40, force_terminal=is_terminal, color_system=None)
        terminal.say(words.strip())
        lines = screen.getvalue().splitlines()
        assert (max(map(len, lines)) <= 40) == is_terminal
        assert " ".join(" ".join(lines).split()) == words.strip()
