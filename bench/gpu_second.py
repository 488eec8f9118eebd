"""The second session on a GPU: 4B and 8B, sweeps of tiles with their bits compared, and the peers.

    python -m bench.gpu_second [--out FOLDER] [--seconds 330] [--only NAME] [--dry]     from the root

As bench/gpu_first.py, after it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu_driver import Job, Place, drive

SECONDS = 330
# Of what runs Triton's kernels directly, where there is no GPU. A product of the interpreter is NumPy's, and
# OpenBLAS' for AVX2 ("Haswell", "Zen") sums in an order that depends on the sizes of a tile; those for older
# processors, which every x86 can run, do not.
INTERPRETED = {"TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem"}


def workload(place: Place, *more: str) -> Job:
    """The common rollout workload with the 0.6B's shape; its row is the last line of what it prints."""
    sizes = "--device cuda --model 0.6B --sequences 256 --shortest 100 --longest 1024"
    if place.dry:
        sizes = "--model 4.2M --sequences 2 --shortest 2 --longest 4"
    words = ["--only", "ours", "--json", "--repeats", "1", *sizes.split(), *more]
    command = [sys.executable, "-m", "bench.workload", *words]
    return Job(name=f"workload{''.join(more)}", seconds=25, command=command)


def peers(place: Place) -> Job:
    """Kernels beside torch, torch.compile and what else is installed, and the roofline."""
    words = ["--no-tests", "--no-engine", "--seconds", "40", "--out", str(place.out / "rows.jsonl")]
    words += ["--dry", "--only", "add_rms_norm"] if place.dry else []
    return Job(name="peers", seconds=40, command=[sys.executable, "bench/gpu_suite.py", *words])


def jobs(place: Place) -> list[Job]:
    sizes = {
        "ceilings": 10.0,
        "decode-8B": 40.0,
        "update-8B-lora": 40.0,
        "decode-4B": 35.0,
        "update-4B": 40.0,
    }
    return [
        *place.jobs("bench.gpu_profiles", sizes),
        *place.jobs("bench.gpu_profiles", {"tiles": 45.0, "warps": 30.0}, **INTERPRETED if place.dry else {}),
        workload(place),
        workload(place, "--fast"),
        peers(place),
    ]


if __name__ == "__main__":
    sys.exit(drive(__doc__, SECONDS, jobs))
