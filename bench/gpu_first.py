"""The first minutes on a GPU: is everything right there, and where does the time go?

    python -m bench.gpu_first [--out FOLDER] [--seconds 300] [--only NAME] [--dry]     from the root

Needs no installation. Every stage is a process with seconds kept for it; every result is at once a line of
FOLDER/rows.jsonl (FOLDER is $OUT where nothing is said). Ends with a summary of at most 8,000 characters.
--dry runs every stage on the CPU at tiny size.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu_driver import Job, Place, drive

SECONDS = 300
CHECKED = "rope or write or sparse or moves"  # tests of kernels that follow indices


def tests(place: Place) -> Job:
    """The GPU tests, on many cores: most of their time is compilation. Dry they are only collected."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-rfE"]
    command += ["-p", "no:cacheprovider", "-p", "bench.gpu_rows", f"--rows={place.out}"]
    if place.dry:
        command.append("--collect-only")
    else:
        command += ["-n", "12"] if importlib.util.find_spec("xdist") else []
    return Job(name="tests", seconds=75, command=command)


def memcheck(place: Place) -> Job:
    """Bad addresses, by NVIDIA's tool where it is installed and in the time that others left."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or place.dry:
        absent = [sys.executable, "-c", "print('compute-sanitizer is absent, or this is dry')"]
        return Job(name="memcheck", seconds=10, command=absent)
    pytest = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "-k", CHECKED]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *pytest]
    return Job(name="memcheck", seconds=10, command=command, env=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def jobs(place: Place) -> list[Job]:
    """Right before fast."""
    right = {"smoke": 40.0, "update": 35.0, "recipe": 35.0}
    return [
        *place.jobs("bench.gpu_stages", {"versions": 15.0}),
        tests(place),
        *place.jobs("bench.gpu_stages", right),
        *place.jobs("bench.gpu_profiles", {"decode-0.6B": 50.0, "update-0.6B": 40.0}),
        memcheck(place),
    ]


if __name__ == "__main__":
    sys.exit(drive(__doc__, SECONDS, jobs))
