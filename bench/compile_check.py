"""Compiles every Triton kernel ahead of time for A100, H100 / H200 and B200; no GPU or driver is needed.

    python -m bench.compile_check [--chips 80,90,100] [--only SUBSTRING] [--jobs 2] [--json]   from the root

Prints per kernel and chip the registers, bytes of stack (spills), shared memory and tensor-core instructions,
and one JSON line last. Exits 1 when a kernel does not compile, spills more than SPILL_BYTES, or needs more
shared memory than the chip has. The cases are those of bench/compile_cases.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compile_cases import LAUNCH, Case, compile_cases

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # a thread block's most
SPILL_BYTES = 128  # the fp32 form of attention, which is there for tests, spills a little


def cases(chip: int = 90) -> list[tuple[str, Case]]:
    """(name, case) of all that this chip is asked for, in one order."""
    return [(case_name(case), case) for case in compile_cases(chip)]


def case_name(case: Case) -> str:
    kernel, signature, constants, warps = case
    elements = {f"{start}{name}": name for name in ("fp32", "bf16", "fp16") for start in ("*", "tensordesc<")}
    pointed = {elements.get(kind.partition("[")[0]) for kind in signature.values()}
    types = "/".join(sorted(name for name in pointed if name))
    flags = " ".join(f"{name}={int(value)}" for name, value in constants.items())
    return f"{kernel.__name__} {types} {flags} num_warps={warps}"


def compile_one(case: Case, chip: int) -> Any:
    kernel, signature, constants, warps = case
    options = {"num_warps": warps, **{name: constants[name] for name in LAUNCH if name in constants}}
    flags = {name: value for name, value in constants.items() if name not in LAUNCH}
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    loose = {p.name for p in kernel.params if p.do_not_specialize}
    attributes = {}
    for i, (name, kind) in enumerate(types.items()):  # pointers and sizes are usually multiples of 16
        if kind.startswith("*") or (kind in ("i32", "i64") and name not in loose):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, flags, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack) that the assembler gave the kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text
    return int(usage[1]), int(usage[2])


def check(index: int, chip: int) -> dict[str, Any]:
    name, case = cases(chip)[index]
    row: dict[str, Any] = {"kernel": name, "chip": f"sm_{chip}"}
    try:
        compiled = compile_one(case, chip)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error)[-500:]}"}
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    used = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "")
    shared = compiled.metadata.shared
    row |= {"registers": registers, "spill_bytes": stack, "shared_bytes": shared, "tensor_cores": used}
    row["tma"] = "cp.async.bulk.tensor" in ptx
    if stack > SPILL_BYTES:
        row["error"] = f"spills {stack} bytes, at most {SPILL_BYTES}"
    if shared > SHARED_BYTES[chip]:
        row["error"] = f"needs {shared} bytes of shared memory, there are {SHARED_BYTES[chip]}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", default="80,90,100", help="compute capabilities, with commas")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    chips = [int(chip) for chip in args.chips.split(",")]
    if unknown := [chip for chip in chips if chip not in SHARED_BYTES]:
        parser.error(f"--chips {unknown[0]}: accepted are {', '.join(map(str, SHARED_BYTES))}")
    wanted = [(i, chip) for chip in chips for i, (name, _) in enumerate(cases(chip)) if args.only in name]
    if not wanted:
        parser.error(f"--only {args.only}: no kernel has it in its name")
    rows = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(check, *zip(*wanted, strict=True)):
            rows.append(row)
            if not args.json:
                print("  ".join(f"{k}={v}" for k, v in row.items() if v != ""), flush=True)
    bad = [row for row in rows if "error" in row]
    print(json.dumps({"bench": "compile_check", "compiled": len(rows), "failed": len(bad), "rows": rows}))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
