"""A short run of bench/exact.py: rollout and training log-probs agree to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from duologue.kernels import backend

SCRIPT = Path(__file__).parent.parent / "bench" / "exact.py"


pytestmark = pytest.mark.skipif(
    not backend.available(), reason="bitwise equality is a promise of the C++ kernels, which are not built"
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logprob_differs(dtype: str) -> None:
    command = [sys.executable, str(SCRIPT), "--tokens", "25000", "--dtype", dtype, "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] >= 25_000
    assert found["differing"] == 0
    assert found["preemptions"] > 0
    assert found["shared_tokens"] > 0


def test_a_terminated_run_says_what_it_compared() -> None:
    command = [sys.executable, str(SCRIPT), "--tokens", "1000000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        compared = int(run.stdout.readline().split(" tokens")[0].replace(",", ""))
        run.send_signal(signal.SIGTERM)
        *_, last = run.stdout.read().splitlines()
    assert run.returncode == 0
    found = json.loads(last)
    assert 0 < compared <= found["tokens"] < found["wanted_tokens"]
    assert found["differing"] == 0
