"""bench/gpu_first.py and bench/gpu_second.py: every stage, tiny, on the CPU; and what a lost stage costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def rows_of(script: str, out: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "bench" / script), "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
    failed = [row for row in rows if not row.get("ok", True)]
    assert done.returncode == 0, (failed, done.stderr[-2000:])
    assert not failed
    assert 200 < len((out / "summary.txt").read_text("utf-8")) <= 8_001
    return rows


def stages(rows: list[dict[str, Any]]) -> set[str]:
    return {row["stage"] for row in rows if "ended" not in row}


def test_the_first_session(tmp_path: Path) -> None:
    rows = rows_of("gpu_first.py", tmp_path)
    assert stages(rows) == {"versions", "smoke", "update", "recipe", "decode-0.6B", "update-0.6B"}
    assert sum("ended" in row for row in rows) == 5
    (run,) = [row for row in rows if row["stage"] == "recipe"]
    assert 0 < run["killed_at"] < run["lines"]
    (batch,) = [row for row in rows if row["stage"] == "decode-0.6B"]
    assert batch["tokens_per_s"] > 0
    assert len(batch["kernels"]) > 5


def test_the_second_session(tmp_path: Path) -> None:
    rows = rows_of("gpu_second.py", tmp_path)
    measured = {
        "ceilings",
        "decode-8B",
        "update-8B-lora",
        "decode-4B",
        "update-4B",
        "tiles",
        "warps",
        "peers",
    }
    assert stages(rows) == measured
    assert sum("ended" in row for row in rows) == 5
    of_workloads = [json.loads(row["tail"].splitlines()[-1]) for row in rows if "workload" in row["stage"]]
    assert [row["rows"][0]["exact"] for row in of_workloads] == [True, False]


def test_a_stage_that_hangs_or_dies_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu_driver import SUMMARY, Job, Rows, run_all

    codes = {
        "hangs": "import signal, time; signal.signal(2, signal.SIG_IGN); print('so far'); time.sleep(600)",
        "dies": "import os; os.abort()",
        "works": "print('y' * 50_000)",
    }
    jobs = [Job(name=name, seconds=2, command=[sys.executable, "-c", code]) for name, code in codes.items()]
    rows = Rows(tmp_path / "rows.jsonl")
    rows.check("early", "a check that raises", lambda: {"ok": 1 / 0})
    assert run_all(jobs, rows, 500) == 1
    early, hangs, dies, works = rows.read()
    assert early["error"].startswith("ZeroDivisionError")
    assert hangs["late"]
    assert hangs["tail"] == "so far\n"
    assert (dies["rc"], dies["ok"], works["rc"], works["ok"]) == (-6, False, 0, True)
    text = (tmp_path / "summary.txt").read_text("utf-8")
    assert text.startswith("4 rows, 3 failed")
    assert len(text) <= SUMMARY + 1
    late = Rows(tmp_path / "late.jsonl")
    assert run_all(jobs, late, 0) == 1
    assert [row["left_out"] for row in late.read()] == [True] * 3


def test_tests_that_are_late_have_said_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as soon as it has ended, for what is printed at the end is lost."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu_driver import Rows

    bodies = {"right": "pass", "wrong": "assert 1 == 2", "slow": "__import__('time').sleep(600)"}
    code = "\n".join(f"def test_{name}():\n    {body}\n" for name, body in bodies.items())
    (tmp_path / "test_late.py").write_text(code, "utf-8")
    command = [sys.executable, "-m", "pytest", str(tmp_path / "test_late.py"), "-q", "-n", "1"]
    command += ["-p", "no:cacheprovider", "-p", "bench.gpu_rows", f"--rows={tmp_path}"]
    ended = Rows(tmp_path / "tests.jsonl")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        limit = time.monotonic() + 120
        while len(ended.read()) < 2:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert [row["outcome"] for row in ended.read()] == ["passed", "failed"]
    (wrong,) = Rows(tmp_path / "rows.jsonl").read()
    assert wrong["test"].endswith("test_late.py::test_wrong")
    assert not wrong["ok"]
    assert "assert 1 == 2" in wrong["error"]


def test_what_is_kept_for_a_stage_is_there_whatever_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that hang take what is theirs and what is nobody's; the seconds of a session's stages fit it."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu_first, gpu_second
    from bench.gpu_driver import Job, Place, Rows, run_all

    hang, work = "import time; time.sleep(600)", "import time; time.sleep(1)"
    kept = {"one": (1, hang), "two": (1, hang), "last": (20, work)}
    jobs = [
        Job(name=name, seconds=n, command=[sys.executable, "-c", code]) for name, (n, code) in kept.items()
    ]
    rows = Rows(tmp_path / "rows.jsonl")
    assert run_all(jobs, rows, 24) == 1
    one, two, last = rows.read()
    assert (one["limit"], two["limit"]) == (2, 2)
    assert last["ok"]
    place = Place("cuda", dry=False, out=tmp_path)
    for session in (gpu_first, gpu_second):
        assert sum(job.seconds for job in session.jobs(place)) <= session.SECONDS


def test_a_bare_checkout_needs_no_installation(tmp_path: Path) -> None:
    """Links stand in for it: for the version, the command line and child processes. With -S no installation
    in place is seen.
    """
    code = f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from bench.bare import find_package, is_installed
assert not is_installed()
find_package()
child = "import sys, duologue.grpo.cli as cli; print(cli.__file__); sys.exit(cli.main(['--version']))"
sys.exit(subprocess.run([sys.executable, "-S", "-c", child]).returncode)
"""
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    env = {**os.environ, "PYTHONPATH": packages}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "duologue-bare-" in done.stdout
