"""Runs tests/triton_interpreted.py in Triton's interpreter, which must be chosen before a kernel is imported; and the compile check."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform"
)
ROOT = Path(__file__).parent.parent


def test_kernels_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/triton_interpreted.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_compile_check_for_one_chip() -> None:
    command = [
        sys.executable,
        "-m",
        "bench.compile_check",
        "--json",
        "--chips",
        "90",
        "--only",
        "bf16/fp32 ROTATE=1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["kernel"].startswith("rotary_kernel")
    assert 0 < row["registers"] < 256
    assert row["spill_bytes"] == 0


def test_compile_check_refuses_spills_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import compile_check

    names = [name for name, _ in compile_check.cases()]
    index = next(
        i for i, name in enumerate(names) if name.startswith("linear_kernel bf16 ") and "COLUMNS=16" in name
    )
    found = compile_check.check(index, 90)
    assert "error" not in found
    assert found["tensor_cores"] == "wgmma"
    monkeypatch.setitem(compile_check.SHARED_BYTES, 90, found["shared_bytes"] - 1)
    assert "shared memory" in compile_check.check(index, 90)["error"]
    monkeypatch.setattr(compile_check, "SPILL_BYTES", -1)
    monkeypatch.setitem(compile_check.SHARED_BYTES, 90, found["shared_bytes"])
    assert "spills" in compile_check.check(index, 90)["error"]
