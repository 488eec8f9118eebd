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
import zlib
from pathlib import Path
from typing import Any

NAMELESS = "default"  # a server whose model nobody has named
COLUMNS = "key, kind, judge, version, answer"
TABLES = (
    "CREATE TABLE IF NOT EXISTS answers"
    " (key TEXT PRIMARY KEY, kind TEXT, judge TEXT, version TEXT, answer TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS checksums (key TEXT PRIMARY KEY, crc32 INTEGER) WITHOUT ROWID",
)


def ledger_key(judge: str, version: str, settings: dict[str, Any], text: str) -> str:
    """The address of a question: who is asked, with which version of the prompt, with which settings, and
    what.
    """
    return hashlib.sha256(json.dumps([judge, version, settings, text], sort_keys=True).encode()).hexdigest()


class Ledger:
    """`get` and `put` may be called from any thread; `put` has written to the file when it returns.

    A file that is damaged is a ValueError here; an answer of it that was altered counts as none.
    """

    def __init__(self, path: Path, name: str = "judge.ledger") -> None:
        """`name` is what a message calls it."""
        self.path, self.name = path, name
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None
        try:
            self._prepare()
        except (sqlite3.Error, OSError, ValueError) as error:
            self._db.close()
            raise self._unusable(error) from None

    def _prepare(self) -> None:
        self._db.text_factory = bytes  # an answer that is no UTF-8 is no answer
        self._use_wal()
        self._db.execute("PRAGMA synchronous = NORMAL")
        for table in TABLES:
            self._db.execute(table)
        self._db.execute(f"SELECT {COLUMNS} FROM answers LIMIT 0")
        if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != b"ok":
            raise ValueError(" ".join(found.decode("utf-8", "replace").split()))

    def _unusable(self, error: Exception) -> ValueError:
        accepted = "accepted is a new file or an earlier ledger"
        way = "move it away with its -wal and -shm, and what it holds is asked again"
        return ValueError(f"{self.name} = {str(self.path)!r} cannot be opened: {error}; {accepted}: {way}")

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
            noted = self._run("SELECT crc32 FROM checksums WHERE key = ?", key).fetchone()
        if row is None or (noted is not None and noted[0] != _crc(row[0])):
            return None
        return _text(row[0])

    def put(self, key: str, kind: str, judge: str, version: str, answer: str) -> None:
        with self._lock:
            self._run("INSERT OR REPLACE INTO checksums VALUES (?, ?)", key, _crc(answer.encode()))
            row = (key, kind, judge, version, answer)
            self._run(f"INSERT OR REPLACE INTO answers ({COLUMNS}) VALUES (?, ?, ?, ?, ?)", *row)

    def claim(self, key: str) -> bool:
        """Whether it is for this process to ask. False: another one does, and its answer will be here, or
        `given_up`.
        """
        return True

    def give_up(self, key: str, reason: str) -> None:
        """Tell those who wait for this process that it found no valid answer."""

    def given_up(self, key: str) -> str | None:
        """Why the process that asked has no answer; None where it has, or still waits."""
        return None

    def _run(self, statement: str, *values: str | int) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise OSError(f"the ledger {self.path} failed: {error}") from error

    def other_name(self, name: str) -> str | None:
        """Under which other name the judge that is called `name`, and whose model nobody has named, may have
        answered here: one address alone for NAMELESS, as in older ledgers, and NAMELESS for an address, as in
        the ledger of another run.
        """
        if name != NAMELESS and "://" not in name:
            return None
        wanted = "%://%" if name == NAMELESS else NAMELESS
        with self._lock:
            others = self._run("SELECT DISTINCT judge FROM answers WHERE judge LIKE ? LIMIT 2", wanted)
            judges = others.fetchall()
        return _text(judges[0][0]) if len(judges) == 1 else None

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _text(stored: Any) -> str | None:
    """A text of the file, None where it is none."""
    try:
        return stored.decode() if isinstance(stored, bytes) else None
    except UnicodeDecodeError:
        return None


def _crc(stored: Any) -> int:
    return zlib.crc32(stored) if isinstance(stored, bytes) else -1
