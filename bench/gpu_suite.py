"""All that needs a GPU, in one command under nine minutes: the GPU tests, then the kernels beside their peers
and the roofline, then the engine.

    python bench/gpu_suite.py [--seconds 440] [--save] [--dry]      from the root; no installation needed

Prints a table and one JSON line last; --out FILE has each row at once, --save appends them to
bench/results/gpu.csv. What does not fit in --seconds is named as left out. --dry runs all of it on the CPU
with tiny sizes, to see that it works. Exits 1 when a test or a measurement fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bare import find_package  # noqa: E402

find_package()

import torch  # noqa: E402

from bench.common import append_rows, calls, ceilings, quantiles  # noqa: E402
from bench.gpu_cases import DRY, SHAPES, Work, works  # noqa: E402
from bench.gpu_driver import Rows  # noqa: E402

MEASURED = ("p20_us", "p50_us", "p80_us", "share_of_roofline", "extra_mb", "error", "failed")


def run_tests(seconds: float, dry: bool) -> dict[str, Any]:
    """The GPU tests in a process of their own; with `dry` they are only collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    command += ["--collect-only"] if dry else []
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        text, failed = done.stdout + done.stderr, done.returncode != 0
    except subprocess.TimeoutExpired as late:
        text, failed = f"{late.stdout!r}\nnot finished after {seconds:.0f} s", True
    outcome = r"(\d+)(?:/\d+)? (passed|failed|skipped|errors?|tests collected)\b"
    counts = {word: int(n) for n, word in re.findall(outcome, text)}
    if failed:
        print(text[-6000:])
    return {"failed": failed, **counts, "seconds": round(time.perf_counter() - began, 1)}


def measure(work: Work, device: str, bandwidth: float, rate: float, budget: float) -> list[dict[str, Any]]:
    floor = max(work.bytes_ / bandwidth, work.flops / rate)
    rows = []
    for provider, run in work.sides.items():
        row: dict[str, Any] = {"op": work.op, "provider": provider, "shape": work.shape, "dtype": "bfloat16"}
        row |= dict.fromkeys(MEASURED, "")
        rows.append(row)
        try:
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            result = run()
            if device != "cpu":
                torch.cuda.synchronize()
                row["extra_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
            if work.error is not None and result is not None:
                row["error"] = float(f"{work.error(result):.3g}")
            del result
            p20, p50, p80 = quantiles(calls(run, seconds=budget, device=device))
        except Exception as error:  # a peer's failure is a result too
            row["failed"] = f"{type(error).__name__}: {str(error)[:160]}".replace("\n", " ")
            continue
        micros = [round(value * 1e6, 1) for value in (p20, p50, p80)]
        row["p20_us"], row["p50_us"], row["p80_us"] = micros
        row["share_of_roofline"] = round(floor / p50, 3)
    return rows


def run_engine(dry: bool, ends: float) -> list[dict[str, Any]]:
    """The common rollout workload with Qwen3-0.6B's shape, exact and fast; bench/workload.py in a process of
    its own."""
    sizes = "--device cuda --model 0.6B --sequences 256 --shortest 100 --longest 1024"
    if dry:
        sizes = "--model 4.2M --sequences 3 --shortest 2 --longest 6"
    options = ["--only", "ours", "--json", "--repeats", "1", *sizes.split()]
    rows = []
    for more in ([], ["--fast"]):
        left = ends - time.perf_counter()
        command = [sys.executable, "-m", "bench.workload", *options, *more]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(left, 1))
            if done.returncode == 0:
                row = json.loads(done.stdout.splitlines()[-1])["rows"][0]
            else:
                row = {"failed": done.stderr[-1500:]}
        except subprocess.TimeoutExpired:
            row = {"failed": "no time left"}
        print("\nrollout  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], missing: tuple[str, ...]) -> None:
    absent = f"   (not installed: {', '.join(missing)})" if missing else ""
    print(f"\n{rows[0]['op']}  {rows[0]['shape']}{absent}")
    for row in rows:
        if row["failed"]:
            print(f"  {row['provider']:26} failed: {row['failed']}")
            continue
        error = f"  error {row['error']:.1e}" if row["error"] != "" else ""
        memory = f"{row['extra_mb']:>8} MB" if row["extra_mb"] != "" else ""
        share = f"{row['share_of_roofline']:>6.1%} of roofline"
        print(f"  {row['provider']:26}{row['p50_us']:>12,.1f} us  {share}{memory}{error}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    seconds = "for tests and kernels; what does not fit is left out and named"
    parser.add_argument("--seconds", type=float, default=440, help=seconds)
    parser.add_argument("--save", action="store_true", help="append to bench/results/gpu.csv")
    parser.add_argument("--out", type=Path, help="append each row to this file at once, as JSON")
    parser.add_argument("--no-tests", action="store_true", help="benches only")
    parser.add_argument("--no-engine", action="store_true", help="kernels only")
    parser.add_argument("--only", default="", help="works whose op holds this")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.dry else "cuda"
    if not args.dry and not torch.cuda.is_available():
        message = "gpu_suite: there is no CUDA device; --dry runs the suite on the CPU with tiny sizes"
        print(message, file=sys.stderr)
        return 2
    ends = time.perf_counter() + args.seconds
    tests = {} if args.no_tests else run_tests(0.45 * args.seconds, args.dry)
    print(f"tests: {tests}")
    bandwidth, rate = ceilings(device, tiny=args.dry)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    left_out = []
    for shape in DRY if args.dry else SHAPES:
        for make in works(shape, device, torch.bfloat16, compiled=not args.dry):
            if time.perf_counter() > ends:
                left_out.append(shape.name)
                continue
            work = make()
            if args.only in work.op:
                measured = measure(work, device, bandwidth, rate, 0.01 if args.dry else 0.5)
                show(measured, work.missing)
                for row in measured if args.out else ():
                    Rows(args.out).add("peers", **row, missing=work.missing)
                rows += measured
            del work
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
    if left_out:
        shapes = ", ".join(sorted(set(left_out)))
        print(f"\nleft out after {args.seconds:.0f} s: {len(left_out)} works of {shapes}")
    if args.save and rows:
        append_rows("gpu", rows)
    broken = [row for row in rows if row["failed"] and row["provider"].startswith("ours")]
    engine = [] if args.only or args.no_engine else run_engine(args.dry, ends + 60)
    summary = {"bench": "gpu_suite", "tests": tests, "bytes_per_s": bandwidth, "flops_per_s": rate}
    print(json.dumps({**summary, "left_out": len(left_out), "rows": rows, "rollout": engine}))
    return int(bool(broken or tests.get("failed") or any("failed" in row for row in engine)))


if __name__ == "__main__":
    sys.exit(main())
