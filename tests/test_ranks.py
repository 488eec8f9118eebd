"""Several ranks, each a process, are one run: the same dialogues and weights, one ledger, one end."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duologue.grpo.build import build_arena, build_game, ledger_of_node
from duologue.grpo.config import load_config
from duologue.grpo.distributed import launch, watch
from duologue.grpo.distributed.ledger import SharedLedger
from duologue.grpo.distributed.world import batches
from duologue.grpo.evaluate import check_lost
from duologue.grpo.policy import load_policy
from duologue.grpo.run_dir import read_lines
from duologue.rollout.engine.engine import Engine
from duologue.rollout.judge.endpoint import Endpoint
from duologue.rollout.judge.judge import FeedbackJudge
from duologue.rollout.judge.questions import REQUIRED, SCORE, Case, load_prompt
from forked import FORKS, LIMIT_S, Started, chaos, limited_rank
from judge_server import JudgeServer
from safetensors.torch import load_file
from thread_ranks import on_ranks
from tiny import MODEL
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.api import SignalException

TOOLS = Path(__file__).parent.parent / "bench"
SETTINGS = [  # with rewards to learn from, and earlier selves among those that are met
    *MODEL,
    f"game.name={TOOLS / 'letters.py'}",
    "model.num_layers=2",
    "rollout.cache_tokens=16384",
    "opponent.kind=mix",
    "opponent.mix={self = 0.5, pool = 0.5}",
    "opponent.pool_every=2",
    "train.steps=5",
    "train.save_every=1",
    "train.kl_every=0",  # an estimate on one micro-batch of each rank
    "train.tokens_per_microbatch=700",
    "grpo.group_size=4",
    "grpo.groups_per_step=5",
    "grpo.advantage=running",
    "dialogue.max_tokens_per_turn=10",
    "eval.dialogues=8",
]
LONG = ["train.steps=100000", "train.rank_timeout_s=100", "train.keep_checkpoints=3"]


def train(run: Path, *more: str) -> list[str]:
    """The command's arguments."""
    resume = ["--resume"] if run.exists() else []
    return ["train", "text-game", *SETTINGS, "train.threads=1", "--run-dir", str(run), *more, *resume]


class Forked:
    """Ranks of a run, without a starter; what they say is in `said`."""

    def __init__(
        self, run: Path, *more: str, ranks: int = 2, file_bytes: int = resource.RLIM_INFINITY
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = train(run, *more)
        self.said = run.with_name(f"{run.name}.said")
        self.said.unlink(missing_ok=True)
        self.ranks = [
            FORKS.Process(target=limited_rank, args=(file_bytes, argv, number, ranks, port, None, self.said))
            for number in range(ranks)
        ]
        for rank in self.ranks:
            rank.start()

    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def ended(self) -> tuple[list[int | None], str]:
        """Exit codes, and what was said."""
        for rank in self.ranks:
            rank.join(LIMIT_S)
        return [rank.exitcode for rank in self.ranks], self.said.read_text("utf-8")

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: Any) -> None:
        for rank in self.ranks:
            rank.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run by 1, 2 and 4 ranks; that of 2 on two nodes, which meet by torchrun's rendezvous."""
    folder = tmp_path_factory.mktemp("ranks")
    port = 29_000 + os.getpid() % 2_000
    meeting = ["--rdzv-backend=c10d", "--rdzv-id=t", f"--rdzv-endpoint=localhost:{port}"]
    by_torchrun = ["--nnodes=2", "--nproc-per-node=1", *meeting, "-m", "duologue.grpo.cli"]
    two = train(folder / "2")
    nodes = [Started(folder / f"node{number}", "torchrun", *by_torchrun, *two) for number in range(2)]
    for ranks in (1, 4):
        with Forked(folder / str(ranks), ranks=ranks) as forked:
            codes, said = forked.ended()
            assert codes == [0] * ranks, said
    for node in nodes:
        code, _, err = node.ended()
        assert not code, err
    return {n: folder / str(n) for n in (1, 2, 4)}


def test_gradients_that_linears_put_in_place_reach_the_other_process(tmp_path: Path) -> None:
    """By gloo: two processes have the bits of one, whose rows are dealt alike."""
    fused = ["model.dtype=bfloat16", "train.gradient_accumulation_fusion=true", "train.shares=2"]
    short = ["train.steps=2", "opponent.kind=self", "opponent.mix={}", "opponent.pool_every=10"]
    for ranks in (1, 2):
        with Forked(tmp_path / str(ranks), *fused, *short, ranks=ranks) as forked:
            codes, said = forked.ended()
            assert codes == [0] * ranks, said
    folders = [tmp_path / str(ranks) / "checkpoints" / "step_000002" for ranks in (1, 2)]
    one, two = ({**load_file(f / "model.safetensors"), **torch.load(f / "optimizer.pt")} for f in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def first_step(run: Path) -> list[dict[str, Any]]:
    """Its dialogues."""
    return [row for row in read_lines(run / "dialogues.jsonl") if row["step"] == 0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_is_the_same_for_any_number_of_ranks(runs: dict[int, Path], ranks: int) -> None:
    one, many = runs[1], runs[ranks]
    assert len(first_step(one)) >= 5 * 4
    assert first_step(one) == first_step(many)
    last = "checkpoints/step_000005/model.safetensors"
    a, b = load_file(one / last), load_file(many / last)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6
    for before, after in zip(
        read_lines(one / "metrics.jsonl"), read_lines(many / "metrics.jsonl"), strict=True
    ):
        assert len(after.pop("idle_share")) == ranks
        assert before["no_variance_share"] < 1
        for table in ("payoff", "partners"):
            assert before[table].keys() == after[table].keys()
            for name, row in before.pop(table).items():
                assert after[table][name] == pytest.approx(row, rel=1e-4)
        for table in ("elo", "watch"):
            assert after[table] == pytest.approx(before.pop(table), rel=1e-4, abs=1e-6)
        words = [key for key, value in before.items() if isinstance(value, str)]  # of stage, instruction set
        assert [after[key] for key in words] == [before.pop(key) for key in words]
        same = {k for k in before if not k.endswith(("seconds", "_per_s", "bytes"))}
        assert {k: after[k] for k in same} == pytest.approx({k: before[k] for k in same}, rel=1e-4, abs=1e-6)
    summaries = [json.loads((run / "summary.json").read_text("utf-8"))["trained"] for run in (one, many)]
    assert summaries[0] == pytest.approx(summaries[1])


def until_saved(run: Path, lives: Callable[[], bool], steps: int = 2) -> None:
    """Until a checkpoint of so many steps is there."""
    ends = time.monotonic() + LIMIT_S
    while not any(chaos.steps_of(path) >= steps for path in (run / "checkpoints").glob("step_*")):
        assert lives()
        assert time.monotonic() < ends
        time.sleep(0.05)


def is_saved(run: Path) -> int:
    """Steps of the last checkpoint, which are all that were taken."""
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == [*range(len(steps))]
    saved = max(chaos.steps_of(path) for path in (run / "checkpoints").glob("step_*"))
    assert saved == len(steps)
    return saved


def one_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("duologue: ")]
    return line


def test_a_dead_rank_ends_all_and_a_signal_to_the_starter_saves(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    """One run, killed in a rank, then asked to end by each signal to the process that started it."""
    run, pids = tmp_path / "run", [0] * 0
    try:
        starter = Started(run, "duologue", *train(run, "--ranks", "2", *LONG))
        until_saved(run, starter.lives)
        pids = starter.children()
        os.kill(pids[1], signal.SIGKILL)
        code, _, err = starter.ended()
        assert code == 1
        (line,) = [line for line in err.splitlines() if line]
        assert line.startswith("duologue: rank 1 (step ")
        assert "died" in line
        assert not any(chaos.alive(pid) for pid in pids)
        assert first_step(run) == first_step(runs[1])
        for number in (signal.SIGTERM, signal.SIGINT):
            before = max(chaos.steps_of(path) for path in (run / "checkpoints").glob("step_*"))
            starter = Started(run, "duologue", *train(run, "--ranks", "2", *LONG))
            until_saved(run, starter.lives, before + 1)
            pids = starter.children()
            starter.send_signal(number)
            code, out, err = starter.ended()
            assert (code, err) == (0, "")
            assert "the state is saved" in out
            assert is_saved(run) > before
            assert not any(chaos.alive(pid) for pid in pids)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("saved", [0, 1, 2])
def test_a_signal_to_the_starter_is_no_success_where_a_rank_did_not_save(
    saved: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(*_: Any) -> Callable[..., None]:
        for number in range(saved):
            launch.ended(Path(os.environ[watch.SAID]), number).touch()
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setattr(launch, "elastic_launch", signalled)
    assert launch.launch(2, ["train"], 30.0) == (0 if saved == 2 else 1)
    error = capsys.readouterr().err
    assert ("before all had saved, train.rank_timeout_s = 30" in error) == (saved < 2)


# ---- ranks without a starter -------------------------------------------------------------------------------


def test_a_signal_to_any_rank_saves_and_ends_all(tmp_path: Path) -> None:
    run, before = tmp_path / "run", 1
    for number in (signal.SIGTERM, signal.SIGINT):
        for asked in (0, 1):
            with Forked(run, *LONG) as forked:
                until_saved(run, forked.alive, before + 1)
                os.kill(forked.ranks[asked].pid or 0, number)
                codes, said = forked.ended()
            assert codes == [0, 0], said
            assert "the state is saved" in said
            assert "duologue: " not in said
            assert is_saved(run) > before
            before = is_saved(run)


def test_a_stuck_rank_ends_all_with_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Forked(run, *LONG, "train.rank_timeout_s=8") as forked:
        until_saved(run, forked.alive)
        os.kill(forked.ranks[1].pid or 0, signal.SIGSTOP)
        codes, said = forked.ended()
    assert codes == [1, -signal.SIGKILL]
    assert one_line(said).startswith("duologue: rank 1 (step ")
    assert "train.rank_timeout_s = 8" in said


def test_a_disk_that_is_full_ends_all_with_one_line(tmp_path: Path) -> None:
    """The first one cannot write its checkpoint, while both train on."""
    run = tmp_path / "run"
    with Forked(run, *LONG, file_bytes=20_000) as forked:
        codes, said = forked.ended()
    assert codes == [1, 1]
    assert one_line(said).startswith("duologue: the checkpoint ")
    assert "could not be written" in said
    assert not [*(run / "checkpoints").glob("*step*")]


@pytest.mark.parametrize(
    ("words", "phases"),
    [
        (["--ranks", "2", "--seed", "2"], ["reduction", "gathering", "lines", "saving"]),
        (["--judged", "--seed", "7"], ["judging", "any"]),
    ],
    ids=["ranks", "judged"],
)
def test_a_run_that_was_killed_comes_to_the_same(words: list[str], phases: list[str], tmp_path: Path) -> None:
    sizes = ["--kills", str(len(phases)), "--steps", "6", "--forked"]
    code, out, err = Started(tmp_path / "chaos", "chaos", *words, *sizes).ended()
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["differ"] for row in rows if "differ" in row][-1] == []
    assert [row["phase"] for row in rows if "kill" in row] == phases


def test_no_question_is_asked_twice_on_a_node(judge_server: JudgeServer, tmp_path: Path) -> None:
    """Two ranks ask the same at once: each is answered, whoever asked; what failed, failed for both."""
    judge_server.delay = 0.1
    judge_server.fault = lambda n, prompt: "malformed" if "Case 3" in prompt else None
    store = HashStore()
    store.set_timeout(datetime.timedelta(seconds=30))
    cases = [Case(dilemma=f"Case {i}.", turns=(), completion=f"{i}") for i in range(6)]

    def rank(number: int) -> list[Any]:
        world: Any = SimpleNamespace(store=store, round=1)
        judge = FeedbackJudge(
            Endpoint(judge_server.url, "known", deadline_s=3.0, timeout_s=2.0),
            SharedLedger(tmp_path / "judge.sqlite", world),
            {kind: load_prompt(kind) for kind in REQUIRED},
        )
        for i in range(6) if number == 0 else reversed(range(6)):
            judge.submit(SCORE, cases[i], i)
        found: dict[int, Any] = {}
        ends = time.monotonic() + 60
        while len(found) < 6 and time.monotonic() < ends:
            found |= dict(judge.answered(wait=True))
        judge.close()
        return [found[i] for i in range(6)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert first == second
    assert [answer is None for answer in first] == [i == 3 for i in range(6)]
    prompts = [body["messages"][0]["content"] for body in judge_server.requests]
    asked = [prompt for prompt in prompts if "Case 3" not in prompt]
    assert len(asked) == len(set(asked)) == 5


def test_a_ledger_for_each_node(tmp_path: Path) -> None:
    """SQLite's log of writes is shared by the processes of one machine alone."""
    here = socket.gethostname()
    path = tmp_path / "judge.sqlite"
    for hosts, name in (([here, "b"], "judge.sqlite"), (["a", "a", here, "b", here], "judge.1.sqlite")):
        world: Any = SimpleNamespace(each=lambda _, hosts=hosts: hosts)
        assert ledger_of_node(path, world) == tmp_path / name


def test_an_error_of_a_rank_has_the_exit_code_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    words = [word for word in train(tmp_path / "full", "--ranks", "2") if word != "--resume"]
    code, _, err = Started(tmp_path / "starter", "duologue", *words).ended()
    assert code == 2, err
    assert err.count("duologue: ") == 1


class Silent:
    """A judge that answers nobody."""

    who, max_unscored_share, last_fault = "the judge", 0.1, ""

    def __init__(self, lost: Callable[[int], bool]) -> None:
        self._lost, self._asked, self._n = lost, [], 0

    def submit(self, kind: str, case: Case, tag: Any) -> None:
        self._asked.append(tag)

    def answered(self, wait: bool) -> list[tuple[Any, Any]]:
        asked, self._asked = self._asked, []
        answers = []
        for tag in asked:
            answers.append((tag, None if self._lost(self._n) else {"agreed": False}))
            self.last_fault = "it is down" if answers[-1][1] is None else self.last_fault
            self._n += 1
        return answers


@pytest.mark.parametrize(
    ("ranks", "groups", "lost", "said"),
    [
        (8, 16, lambda n: True, "128 of 128"),  # no batch of the queue has as many as would stop it
        (2, 2, lambda n: n == 0, "2 of 16"),  # one on each
        (2, 4, lambda n: False, ""),
    ],
)
def test_unscored_dialogues_are_counted_over_all_ranks(
    ranks: int, groups: int, lost: Callable[[int], bool], said: str, chat_checkpoint: Path
) -> None:
    settings = ["dialogue.max_rounds=1", "dialogue.max_tokens_per_turn=4", "dialogue.max_tokens_final=4"]
    config = load_config(
        "collective-agency", [f"model.path={chat_checkpoint}", *settings, "model.dtype=float32"]
    )
    model, tokenizer = load_policy(chat_checkpoint, config)
    game = build_game(config)
    scenarios = [game.sample(random.Random(i), "train") for i in range(groups)]

    def work(world: Any) -> str:
        judge: Any = Silent(lost)
        arena = build_arena(config, Engine(model, cache_tokens=16384), tokenizer, game, judge)
        for number in range(world.rank, groups, ranks):  # batches of one group
            arena.play(scenarios, group_size=8, seed=0, chosen=[number])
        try:
            check_lost(arena, world, 8 * groups, 0)
        except RuntimeError as error:
            return str(error)
        return ""

    (heard,) = set(on_ranks(ranks, work))  # alike on all
    assert (f"{said} dialogues are unscored, above" in heard) == bool(said)
    assert ("the last reason: it is down" in heard) == bool(said)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 16, 33])
def test_the_queue_has_every_group_once(n: int, size: int) -> None:
    expected = torch.rand(n, generator=torch.Generator().manual_seed(n)).tolist()
    queue = batches(expected, size)
    assert sorted(number for batch in queue for number in batch) == [*range(n)]
    singles = [expected[batch[0]] for batch in queue[size:]]
    assert singles == sorted(singles, reverse=True)
