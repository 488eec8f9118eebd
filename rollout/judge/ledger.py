"""Every answer of a judge, kept on disk under the hash of what was asked: nothing is asked twice.

A resumed step finds the answers of the step that was cut off, and the rewards of a finished run can be
computed again without the judge. Only valid answers are kept. One file may serve several runs, also at the
same time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any


def ledger_key(judge: str, version: str, settings: dict[str, Any], text: str) -> str:
    """The address of a question: who is asked, with which version of the prompt, with which settings, and
    what.
    """
    return hashlib.sha256(json.dumps([judge, version, settings, text], sort_keys=True).encode()).hexdigest()


class Ledger:
    """`get` and `put` may be called from any thread; `put` has written to the file when it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._use_wal()
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, kind TEXT, judge TEXT, version TEXT, answer TEXT) WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            accepted = "accepted is a new file or an earlier ledger"
            raise ValueError(f"judge.ledger = {str(path)!r} cannot be opened: {error}; {accepted}") from None

    def _use_wal(self) -> None:
        """Two processes that change the mode of a new file at once lock each other out at once: SQLite's
        timeout does not wait here.
        """
        ends = time.monotonic() + 60
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > ends:
                    raise
                time.sleep(0.01)

    def get(self, key: str) -> str | None:
        """The answer, None when there is none."""
        with self._lock:
            row = self._run("SELECT answer FROM answers WHERE key = ?", key).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, kind: str, judge: str, version: str, answer: str) -> None:
        with self._lock:
            self._run(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", key, kind, judge, version, answer
            )

    def _run(self, statement: str, *values: str) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise OSError(f"the judge's ledger {self.path} failed: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()
