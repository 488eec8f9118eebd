"""A file of tests in Triton's interpreter, which must be chosen before a kernel is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.gpu_second import INTERPRETED

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**INTERPRETED, "OMP_NUM_THREADS": "1"}


def passes(file: str) -> None:
    """Run tests/`file`; AssertionError, with what was printed, unless all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}"]
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
