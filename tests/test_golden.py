"""A fixed set of dialogues, completions, updates and runs gives the bits that were recorded once.

`golden_cases.py` plays it; a difference is named by case, item and field. A run that was stopped when these
were recorded resumes to the same end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from duologue.kernels import backend
from golden_cases import SETTING

CASES = Path(__file__).resolve().parent / "golden_cases.py"
DIGESTS = CASES.parent / "golden" / "digests.json"
RECORDED = json.loads(DIGESTS.read_text("utf-8"))
SHOWN = 12  # differences of a case that are printed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The differences of every case. The process that plays has the instruction set from its start."""
    if not backend.available():
        pytest.skip("the bits are those of the C++ kernels, which are not built")
    path = tmp_path_factory.mktemp("golden") / "differences.json"
    command = [sys.executable, str(CASES), "--compare", str(DIGESTS), "--json", str(path)]
    unset = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DUOLOGUE_DEBUG")
    }
    done = subprocess.run(command, env={**unset, **SETTING}, capture_output=True, text=True, timeout=600)
    if "DUOLOGUE_CPU = 'avx2': accepted is" in done.stderr:
        pytest.skip("the bits were recorded with AVX2, which this machine lacks")
    assert path.is_file(), done.stderr
    differences: dict[str, list[str]] = json.loads(path.read_text("utf-8"))
    return differences


@pytest.mark.parametrize("name", RECORDED)
def test_the_same_bits(found: dict[str, list[str]], name: str) -> None:
    lines = found[name]
    more = f"\nand {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    assert not lines, "\n" + "\n".join(lines[:SHOWN]) + more


def test_nothing_is_played_that_was_not_recorded(found: dict[str, list[str]]) -> None:
    assert found.keys() == RECORDED.keys()


def test_there_is_as_much_as_was_promised() -> None:
    counts = dict.fromkeys(("negotiations", "deliberations", "engine"), 0)
    for name, case in RECORDED.items():
        if (kind := name.split()[0]) in counts:
            counts[kind] += case["items"]
    assert counts == {"negotiations": 192, "deliberations": 192, "engine": 576}
    assert sum(p.stat().st_size for p in DIGESTS.parent.rglob("*") if p.is_file()) < 300_000
