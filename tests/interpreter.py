"""A file of tests in Triton's interpreter, which must be chosen before a kernel is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def replace_language_once() -> None:
    """At each call of a helper inside a kernel Triton replaces the language's functions by interpreted ones,
    which took half of these tests' time: have it done once in a launch for each module of them.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    modules_of: dict[Any, frozenset[str]] = {}
    replaced: set[str] = set()
    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__

    def launch_anew(grid: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()  # a launch puts back what it replaced
        return launch(grid, *args, **kwargs)

    def call_in_a_launch(helper: Any, *args: Any, **kwargs: Any) -> Any:
        modules = modules_of.get(helper.fn)
        if modules is None:
            seen = {id(value) for value in helper.fn.__globals__.values()}
            modules = frozenset(m.__name__ for m in (tl, tl.core) if id(m) in seen)
            modules_of[helper.fn] = modules
        if not modules <= replaced:
            replaced.update(modules)
            return call(helper, *args, **kwargs)
        return helper.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call_in_a_launch
