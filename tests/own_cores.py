"""Imported before torch: a worker of pytest-xdist keeps to its part of the cores, and so do the processes
that its tests start. Thread pools of two workers on the same cores would mostly wait for each other.
"""

from __future__ import annotations

import os

cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if cores and "PYTEST_XDIST_WORKER" in os.environ:
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[worker::workers] or cores)
