"""The path of a GPU, as far as it can be walked without one: what is imported there, which device is used,
how a loop owns its graphs, what an update sums in which order.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABSENT = ("trl", "liger_kernel", "flash_attn", "bitsandbytes", "tenacity", "textarena", "openai")  # may be
HIDE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def without(cls, name, *rest):
    return None if name.partition(".")[0] in {ABSENT} else find(name, *rest)
PathFinder.find_spec = classmethod(without)
"""


def test_tests_are_collected_where_other_trainers_are_not_installed() -> None:
    """Of the GPU tests, and those that once imported trl at their head, with the trainer itself."""
    code = f"""{HIDE}
import sys, pytest
import duologue.grpo.cli, duologue.grpo.trainer
files = ["tests/test_gpu.py", "tests/test_chat.py"]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/test_gpu.py::" in done.stdout
    assert "tests/test_chat.py::" in done.stdout


def test_no_test_imports_what_may_be_absent_at_its_head() -> None:
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {*ABSENT}, path.name
