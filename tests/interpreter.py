"""A file of tests in Triton's interpreter, which must be chosen before a kernel is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A product of the interpreter is NumPy's, and OpenBLAS' for AVX2 ("Haswell", "Zen") sums in an order that
# depends on the sizes of a tile; those for older processors, which every x86 can run, do not.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"}


def passes(file: str) -> None:
    """Run tests/`file`; AssertionError, with what was printed, unless all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}"]
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
