"""Sees to it that the ranks of a run end together: a thread of each rank tells that it is alive, and looks
whether another has failed, died or got stuck.

The first to see a failure puts it into the store and prints it, one line; everybody else ends without a word.
A rank is dead when its process is gone (on this machine) or when it has not been heard of for `timeout_s`;
it is stuck when the others have waited for it that long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore

EVERY_S = 0.25  # looks
FAILED = "failed"
SAID = "DUOLOGUE_SAID"  # names a file that exists once a rank has said why the run ended


class Watch:
    """`step` is how far this rank is."""

    def __init__(self, store: PrefixStore, rank: int, size: int, timeout_s: float) -> None:
        self.store, self.rank, self.size, self.timeout_s = store, rank, size, timeout_s
        self.step = 0
        self._met = 0  # how often this rank has come to a place where all meet
        self._waits_since: float | None = None
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # by rank: its last words, and when
        self._over = threading.Event()
        self._lock = threading.Lock()  # of the last words: one process prints, one thread of it
        self._thread = threading.Thread(target=self._look, name="watch of the ranks", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this rank waits for the others."""
        self._met += 1
        self._waits_since = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # of torch.distributed: the connection is gone, or the time is over
            self._give_cause()
            raise RuntimeError(f"the ranks lost each other: {str(error).splitlines()[0]}") from error
        finally:
            self._waits_since = None

    def _give_cause(self) -> None:
        """A moment for the thread to find out who is missing; it then ends this process."""
        self._over.wait(min(self.timeout_s, 5.0))

    def fail(self, reason: str) -> bool:
        """Say why the run ends; False when another rank has said so before."""
        mine = json.dumps({"by": self.rank, "reason": reason})
        with contextlib.suppress(RuntimeError, OSError):
            if self.store.compare_set(FAILED, "", mine) != mine.encode():
                return False
        self._over.set()  # this rank ends as it will
        return True

    def end(self) -> None:
        """This rank is through; nobody minds that it goes."""
        self._tell(done=True)
        self._over.set()
        self._thread.join(timeout=10)

    # ---- the thread ----------------------------------------------------------------------------------------

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            try:
                self._tell()
                if self.store.check([FAILED]):
                    os._exit(1)  # whoever failed has said why
                if found := self._missing():
                    rank, reason = found
                    if self.fail(reason):
                        say(reason)
                    self._put_an_end_to(rank)
                    os._exit(1)
            except (RuntimeError, OSError):  # the store is gone, and with it the launcher
                if not self._over.wait(EVERY_S):
                    os._exit(1)

    def _tell(self, done: bool = False) -> None:
        words = {"host": socket.gethostname(), "pid": os.getpid(), "step": self.step, "met": self._met}
        self.store.set(f"rank/{self.rank}", json.dumps({**words, "done": done, "at": time.time()}))

    def _missing(self) -> tuple[int, str] | None:
        """Who is dead or stuck, and a line that says so."""
        waited = 0.0 if self._waits_since is None else time.monotonic() - self._waits_since
        for rank in range(self.size):
            if rank == self.rank or not self.store.check([f"rank/{rank}"]):
                continue
            words = json.loads(self.store.get(f"rank/{rank}"))
            before, since = self._heard.get(rank, (None, 0.0))
            if words != before:
                self._heard[rank] = words, (since := time.monotonic())
            if words["done"]:
                continue
            last = f"rank {rank} (step {words['step']})"
            if words["host"] == socket.gethostname() and not _lives(words["pid"]):
                return rank, f"{last} died"
            if time.monotonic() - since > self.timeout_s:
                return rank, f"{last} has not been heard of for train.rank_timeout_s = {self.timeout_s:g}"
            if waited > self.timeout_s and words["met"] < self._met:
                return rank, f"{last} kept the others waiting for train.rank_timeout_s = {self.timeout_s:g}"
        return None

    def _put_an_end_to(self, rank: int) -> None:
        """To a process that may be stopped, or deaf to a gentler word."""
        words, _ = self._heard[rank]
        if words["host"] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(words["pid"], signal.SIGKILL)


def say(reason: str) -> None:
    """Why the run ended, on a line of its own."""
    note_said()
    print(f"duologue: {reason}; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)


def note_said(code: int = 1) -> None:
    """For the process that started the ranks: the user has been told, and this is to be the exit code."""
    if path := os.environ.get(SAID):
        Path(path).write_text(str(code), "ascii")


def _lives(pid: int) -> bool:
    """Whether there is such a process that still runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
