"""Runs tests/triton_interpreted.py in Triton's interpreter, which must be chosen before a kernel is imported;
and the compile check."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform"
)
ROOT = Path(__file__).parent.parent


def test_kernels_in_the_interpreter() -> None:
    interpreter.passes("triton_interpreted.py")


def test_compile_cases_name_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.compile_cases import LAUNCH, compile_cases

    for kernel, signature, constants, warps in (
        case for chip in (80, 90, 100) for case in compile_cases(chip)
    ):
        named = [*signature, *(name for name in constants if name not in LAUNCH)]
        assert sorted(named) == sorted(kernel.arg_names)  # a size of 1 is a constant in the middle
        assert warps in (1, 2, 4, 8)


def test_compile_cases_reach_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of kernels/gpu, or a kernel in it, that the list forgot."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.compile_cases import compile_cases

    kernels = set()
    for path in (ROOT / "kernels/gpu").glob("*.py"):
        module = importlib.import_module(f"duologue.kernels.gpu.{path.stem}")
        for name, value in vars(module).items():
            if type(value).__name__ == "JITFunction" and not name.startswith("_"):
                kernels.add(name)
    called_by_kernels = {"noise", "capped", "sequence_of", "of_chunk"}
    assert {kernel.__name__ for kernel, *_ in compile_cases()} == kernels - called_by_kernels


def test_compile_check_for_one_chip() -> None:
    options = ["--json", "--chips", "90", "--only", "rotate_kernel bf16"]
    command = [sys.executable, "-m", "bench.compile_check", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 2  # of any number of heads, and of one
    for row in rows:
        assert row["kernel"].startswith("rotate_kernel")
        assert 0 < row["registers"] < 256
        assert row["spill_bytes"] == 0


def test_linear_of_many_rows_is_compiled_to_the_chips_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Hopper and of Blackwell; an A100 has none, and is not asked to compile it."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import compile_check

    found = []
    for chip in (80, 90, 100):
        for index, (name, _) in enumerate(compile_check.cases(chip)):
            if name.startswith("linear_tma_kernel bf16 "):
                row = compile_check.check(index, chip)
                found.append((row["chip"], row["tensor_cores"], row["tma"], row["spill_bytes"]))
                assert "error" not in row
    assert found == [("sm_90", "wgmma", True, 0), ("sm_100", "tcgen05.mma", True, 0)]


def test_compile_check_refuses_spills_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import compile_check

    names = [name for name, _ in compile_check.cases()]
    narrow = [name for name in names if name.startswith("linear_kernel bf16 ") and "COLUMNS=16" in name]
    index = names.index(narrow[0])
    row = compile_check.check(index, 90)
    assert "error" not in row
    assert row["tensor_cores"] == "wgmma"
    monkeypatch.setitem(compile_check.SHARED_BYTES, 90, row["shared_bytes"] - 1)
    assert "shared memory" in compile_check.check(index, 90)["error"]
    monkeypatch.setattr(compile_check, "SPILL_BYTES", -1)
    monkeypatch.setitem(compile_check.SHARED_BYTES, 90, row["shared_bytes"])
    assert "spills" in compile_check.check(index, 90)["error"]


def test_a_fused_norm_sums_by_the_layout_of_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a sum is its layout's: which elements a thread has, and which threads a row."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import compile_check

    found = []
    for start in ("rms_norm_kernel bf16 HAS_RESIDUAL=0 ROWS=16", "rotate_write_kernel bf16/fp32 HAS_NORM=1"):
        (case,) = [case for name, case in compile_check.cases() if name.startswith(start)]
        text = compile_check.compile_one(case, 90).asm["ttgir"]
        summed = re.findall(r"tt.reduce.*?\}\) : \((tensor<[^>]*), (#\w+)>\) ->", text, re.DOTALL)
        (layout,) = re.findall(rf"^{summed[0][1]} = (.*)$", text, re.MULTILINE)
        found.append((len(summed), summed[0][0], layout))
    assert found[0] == found[1]
    assert found[0][0] == 1
