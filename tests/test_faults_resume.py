"""What a resume goes on with: a checkpoint byte for byte as it was written, frozen weights that later steps
need, and sources that may stand elsewhere but not be others.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.run_dir import read_lines
from duologue.model.checkpoint import load_model
from duologue.rollout.judge.ledger import Ledger, ledger_key
from duologue.rollout.judge.wording import occurs
from judge_server import JudgeServer, serving
from test_collective import DILEMMAS, PAIRS, SMALL, TASKS
from test_faults_judge import outcome
from test_faults_runs import contents, said
from tiny import RUN, TINY_DEAL, lines, run_whole

DEAL = [*TINY_DEAL, "imitation.steps=1", "grpo.groups_per_step=1", "eval.dialogues=1"]
LONGER = ["--resume", "train.steps=3"]


def train(path: Path, *more: str) -> int:
    return main(["train", "price", "--run-dir", str(path), *DEAL, *more])


@pytest.fixture(scope="module")
def lagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that meets itself of two steps ago, with a checkpoint after each of three steps."""
    path = tmp_path_factory.mktemp("lagged") / "run"
    assert train(path, "opponent.kind=lagged:2", "train.steps=3") == 0
    return path


@pytest.fixture
def run(lagged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lagged, tmp_path / "run"))


def flip(file: Path) -> None:
    """Another byte in the last quarter: the file stays as long as it was, and readable."""
    data = bytearray(file.read_bytes())
    data[-len(data) // 4] ^= 1
    file.write_bytes(data)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_damage_of_the_same_length_is_named_and_the_checkpoint_before_goes_on(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step_000004"
    if name == "trainer_state.json":
        text = (newest / name).read_text("utf-8")
        at = text.index('"seconds": ') + len('"seconds": ')
        (newest / name).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], "utf-8")
    else:
        flip(newest / name)
    before = contents(run)
    capsys.readouterr()
    assert train(run, "opponent.kind=lagged:2", "--resume", "train.steps=4") == 2
    error = said(capsys)
    assert f"the checkpoint {newest} is damaged ({name}: " in error
    assert f"step_000003 is whole: to go on from it, remove {newest}" in error
    assert contents(run) == before
    if name == "model.safetensors":
        commands = (["eval", str(newest), "--recipe", "price", *DEAL], ["play", str(run)])
        for command in (*commands, ["export", str(run), str(run.parent / "out")]):
            assert main(command) == 2
            assert f"{newest} is damaged (model.safetensors: " in said(capsys)


def test_the_checkpoint_before_has_all_that_it_needs(lagged: Path, run: Path) -> None:
    """Opponents too: the same lines as without going back."""
    shutil.rmtree(run / "checkpoints" / "step_000004")
    assert train(run, "opponent.kind=lagged:2", "--resume", "train.steps=3") == 0
    assert lines(run) == lines(lagged)


def test_a_kill_before_the_summary_doubles_no_dialogue(run: Path) -> None:
    before = read_lines(run / "dialogues.jsonl")
    (run / "summary.json").unlink()
    assert train(run, "opponent.kind=lagged:2", "--resume", "train.steps=3") == 0
    assert read_lines(run / "dialogues.jsonl") == before
    assert (run / "summary.json").is_file()


def test_a_checkpoint_without_checksums_is_accepted(run: Path) -> None:
    for file in run.rglob("checksums.json"):
        file.unlink()
    assert train(run, "opponent.kind=lagged:2", "--resume", "train.steps=4") == 0


def test_a_folder_of_further_templates_is_no_damage(run: Path) -> None:
    newest = run / "checkpoints" / "step_000004"
    (newest / "additional_chat_templates").mkdir()
    noted = json.loads((newest / "lines.json").read_text("utf-8"))
    noted["additional_chat_templates"] = 4096  # as noted before folders were left out
    (newest / "lines.json").write_text(json.dumps(noted), "utf-8")
    (newest / "checksums.json").unlink()
    assert train(run, "opponent.kind=lagged:2", "--resume", "train.steps=4") == 0


@pytest.mark.parametrize("harm", ["missing", "flipped"])
@pytest.mark.parametrize("name", ["checkpoints/warm_start", "opponents/step_000002"])
def test_frozen_weights_are_looked_at_before_training_goes_on(
    name: str, harm: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if harm == "missing":
        shutil.rmtree(run / name)
    else:
        flip(run / name / "model.safetensors")
    before = contents(run)
    capsys.readouterr()
    assert train(run, "opponent.kind=lagged:2", "--resume", "train.steps=5") == 2
    error = said(capsys)
    assert f"{run / name}, which {'train.kl_every' if 'warm' in name else 'opponent.kind'} = " in error
    assert "put a copy of it back, or start another run" in error
    assert contents(run) == before
    if "warm" in name:
        more = ["opponent.kind=lagged:2", "--resume", "train.steps=5", "train.kl_every=0"]
        watched = 'watch.rollback=["entropy"]'
        assert train(run, *more, watched) == 2
        assert f"{run / name}, which watch.rollback = ['entropy'] " in said(capsys)
        assert train(run, *more) == 0


def test_the_start_that_evaluations_meet_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    settings = ["train.kl_every=0", "eval.every=1", "eval.every_dialogues=4", "eval.partners=[]"]
    assert train(path, *settings, "train.steps=2") == 0
    flip(path / "checkpoints" / "warm_start" / "model.safetensors")
    capsys.readouterr()
    assert train(path, *settings, "--resume", "train.steps=3") == 2
    assert "warm_start, which eval.every = 1" in said(capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_norm_that_is_not_finite_leaves_the_weights(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Optimizer, "squared_grad_norm", lambda self: torch.tensor(value))
    stepped: list[Any] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: stepped.append(self))
    capsys.readouterr()
    assert train(tmp_path / "run", "train.max_bad_updates=1") == 1
    assert (
        f"step 0: grad_norm is {value}, by none of its dialogues alone: the update is skipped; 1 in a row"
        in capsys.readouterr().err
    )
    assert not stepped


# ---- a run with a judge and sources of its own -------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for key, rows in (("dilemmas", DILEMMAS), ("personas", PAIRS), ("tasks", TASKS)):
        (folder / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def judged(path: Path, model: Path, texts: Path, url: str, *more: str) -> int:
    files = [f"game.{key}={texts / key}.jsonl" for key in ("dilemmas", "personas", "tasks")]
    sizes = ["train.steps=1", "train.save_every=1", "eval.dialogues=1", "judge.deadline_s=60", *files]
    start = ["train", "collective-agency", "--model", str(model), "--run-dir", str(path)]
    return main([*start, *SMALL, *sizes, "judge.timeout_s=30", "--judge.url", url, *more])


def test_weights_texts_and_judge_may_move(
    chat_checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base of an adapter, the texts and a server without a model's name, all elsewhere: no question is
    asked again, and the run is the one that stayed where it was.
    """
    model = Path(shutil.copytree(chat_checkpoint, tmp_path / "model"))
    lora = ["lora.rank=2", "imitation.steps=0"]
    with serving() as server:
        for name in ("stays", "moves"):
            assert judged(tmp_path / name, model, texts, server.url, *lora) == 0
        stays = judged(tmp_path / "stays", model, texts, server.url, *lora, "--resume", "train.steps=2")
        assert stays == 0
    other_model, other_texts = tmp_path / "elsewhere", tmp_path / "others"
    model.rename(other_model)
    texts.rename(other_texts)
    shutil.rmtree(tmp_path / "moves" / "checkpoints" / "step_000001")  # its questions come up once more
    kept = known(tmp_path / "moves")
    with serving() as server:
        moved = (tmp_path / "moves", other_model, other_texts, server.url, *lora, "--resume", "train.steps=2")
        assert judged(*moved) == 0
        assert len(known(tmp_path / "moves")) - len(kept) == len(server.requests) > 0
        assert {*known(tmp_path / "moves").values()} == {"default"}
        assert lines_of(tmp_path / "moves") == lines_of(tmp_path / "stays")
        flip_text(other_texts / "tasks.jsonl")
        before = contents(tmp_path / "moves")
        capsys.readouterr()
        assert judged(*moved[:-1], "train.steps=3") == 2
        assert "was started with other content of game.tasks = " in said(capsys)
        assert contents(tmp_path / "moves") == before


def known(run: Path) -> dict[str, str]:
    """key -> judge of all answers."""
    with contextlib.closing(sqlite3.connect(run / "judge.sqlite")) as database:
        return dict(database.execute("SELECT key, judge FROM answers").fetchall())


def lines_of(path: Path) -> list[dict[str, Any]]:
    rows = read_lines(path / "dialogues.jsonl")
    return [row for row in rows if row["stage"] == "selfplay"]


def flip_text(file: Path) -> None:
    file.write_text(file.read_text("utf-8").replace("e", "a", 1), "utf-8")


def test_the_corrected_command_runs_where_a_text_was_refused(
    chat_checkpoint: Path, texts: Path, tmp_path: Path, judge_server: JudgeServer, capsys: Any
) -> None:
    run, file = tmp_path / "run", texts / "dilemmas.jsonl"
    good = file.read_text("utf-8")
    bad = json.dumps({"id": "x", "tier": "everyday", "text": "bad \ud83d half emoji"})
    file.write_text(f"{good}{bad}\n", "ascii")
    assert main(["data", "check", str(file)]) == 2
    assert judged(run, chat_checkpoint, texts, judge_server.url) == 2
    assert f"{file}" in capsys.readouterr().err
    assert not run.exists()
    file.write_text(good, "utf-8")
    assert judged(run, chat_checkpoint, texts, judge_server.url) == 0
    assert judge_server.requests


def test_a_damaged_ledger_is_named_before_anything_is_changed(
    chat_checkpoint: Path, texts: Path, tmp_path: Path, judge_server: JudgeServer, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert judged(run, chat_checkpoint, texts, judge_server.url) == 0
    data = (run / "judge.sqlite").read_bytes()
    (run / "judge.sqlite").write_bytes(b"x" * 4096 + data[4096:])
    before = contents(run)
    capsys.readouterr()
    assert judged(run, chat_checkpoint, texts, judge_server.url, "--resume", "train.steps=2") == 2
    error = said(capsys)
    assert f"{run / 'judge.sqlite'}" in error
    assert "move it away" in error
    assert contents(run) == before
    (run / "judge.sqlite").unlink()
    assert judged(run, chat_checkpoint, texts, judge_server.url, "--resume", "train.steps=2") == 0


def test_an_older_ledger_is_read_by_the_address_that_answered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    address = "http://127.0.0.1:8000/v1"
    ledger.put(ledger_key(address, "1", {}, "text"), "score", address, "1", "{}")
    assert ledger.other_name("default") == address
    assert ledger.other_name("http://elsewhere/v1") is None
    assert ledger.other_name("a model") is None
    ledger.put("another", "score", "http://elsewhere/v1", "1", "{}")
    assert ledger.other_name("default") is None
    ledger.close()


# ---- servers that will not answer --------------------------------------------------------------------------


def test_a_quota_that_is_spent_is_not_waited_for(judge_server: JudgeServer, tmp_path: Path) -> None:
    error = {
        "message": "You exceeded your current quota.",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
    }
    judge_server.script = lambda n, body: (429, {"error": error}, {})
    answer, reason = outcome(judge_server, tmp_path)
    assert answer is None
    assert "insufficient_quota" in reason
    assert len(judge_server.requests) == 1


def test_a_certificate_that_nobody_trusts_ends_the_question(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subject = ["-subj", "/CN=localhost", "-days", "2", "-nodes", "-newkey", "rsa:2048"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    subprocess.run(["openssl", "req", "-x509", *subject, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}/v1"
        answer, reason = outcome_at(url, tmp_path)
        server.shutdown()
    assert answer is None
    assert "SSL_CERT_FILE" in reason
    assert "deadline" not in reason
    with serving() as plain:
        answer, reason = outcome_at(plain.url.replace("http:", "https:"), tmp_path)
    assert "it speaks http, not https" in reason


def outcome_at(url: str, folder: Path) -> tuple[Any, str]:
    class At:
        pass

    at: Any = At()
    at.url = url
    return outcome(at, folder)


def test_a_refused_parameter_is_said_once(
    judge_server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        "error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
    }
    judge_server.script = lambda n, body: (400, refused, {}) if "max_tokens" in body else None
    assert outcome(judge_server, tmp_path)[0] is not None
    error = capsys.readouterr().err
    assert error == "judge.url: the server refuses 'max_tokens': sent as max_completion_tokens from now on\n"


@pytest.mark.parametrize(
    ("quote", "text", "found"),
    [
        ("agree to that", "I disagree to that.", False),
        ("agree to that", "I agree to that.", True),
        ("I can", "I can’t do it.", False),
        ("I can do", "I can't, then I can do it.", True),
        ("take the book", "I take the books.", False),
        ("同意", "我同意。", True),
        ("'yes'", 'He said "yes"', True),
        ("I don't", "I don’t.", True),
    ],
)
def test_a_quote_is_of_whole_words(quote: str, text: str, found: bool) -> None:
    assert occurs(quote, text) == found


# ---- checkpoints of others ---------------------------------------------------------------------------------


def test_attention_dropout_is_refused_by_name(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2")[0], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for value, refused in ((0.0, False), (0, False), (None, False), (0.1, True), ("x", True)):
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": value}))
        if refused:
            with pytest.raises(ValueError, match=r"attention_dropout = .* in config\.json: accepted is 0"):
                load_model(folder)
        else:
            load_model(folder)


def test_an_adapter_brings_its_own_tokenizer(chat_checkpoint: Path, tmp_path: Path) -> None:
    """The oracle is transformers, which reads an adapter's tokenizer from the adapter's folder."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(chat_checkpoint)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(chat_checkpoint)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    _, plain = load_model(chat_checkpoint)
    assert load_model(tmp_path / "adapter")[1].equals(plain)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"has chat_template\.jinja and no tokenizer\.json"):
        load_model(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chat_checkpoint / name, tmp_path / "adapter")
    chat = load_model(tmp_path / "adapter")[1].chat
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    messages = [{"role": "user", "content": "the cat"}]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = load_model(tmp_path / "adapter")[1].encode("the cat")
    assert [*chat.open([]), *chat.heard(ids), *chat.reply()][-len(expected) :] == expected


def test_a_base_that_language_is_compared_with_is_looked_for_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    run_whole(tmp_path / "first", "imitation.steps=1", "train.steps=0")
    shutil.copytree(tmp_path / "first" / "checkpoints" / "step_000001", base)
    path, on_base = tmp_path / "run", [f"model.path={base}", "game.telling=plain", "imitation.steps=0"]
    words = [
        "train",
        "deal",
        "--run-dir",
        str(path),
        *RUN,
        *on_base,
        "eval.ability_prompts=2",
        "eval.ability=true",
    ]
    assert main([*words, "train.steps=1"]) == 0
    base.rename(tmp_path / "elsewhere")
    before = contents(path)
    capsys.readouterr()
    assert main([*words, "train.steps=2", "--resume"]) == 2
    assert "there is no checkpoint, which eval.ability = true needs at the end" in said(capsys)
    assert contents(path) == before
    assert main([*words, "train.steps=2", "--resume", "eval.ability=false"]) == 0
