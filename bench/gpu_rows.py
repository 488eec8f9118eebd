"""A plugin of pytest: each test of a GPU session is a line of FOLDER/tests.jsonl as soon as it has ended, and
one that fails a row of the session too.

    python -m pytest -p bench.gpu_rows --rows=FOLDER tests/test_gpu.py     from the root
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu_driver import Rows

ERROR = 600  # characters


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, required=True, help="the folder of rows.jsonl and tests.jsonl")


class Ended:
    def __init__(self, folder: Path) -> None:
        self.rows = Rows(folder / "rows.jsonl")
        self.tests = Rows(folder / "tests.jsonl")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.rows.add("tests", test=report.nodeid, ok=False, error=report.longreprtext[-ERROR:])
        if report.failed or report.skipped or report.when == "call":
            seconds = round(report.duration, 2)
            self.tests.add("tests", test=report.nodeid, outcome=report.outcome, seconds=seconds)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers report to the process that started them
        config.pluginmanager.register(Ended(config.getoption("rows")))
