"""Checkpoints are written by a thread, from a copy in host memory, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Saver:
    """One save at a time. What goes wrong with it is raised by the next `check` or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Begin, once the save before has come to its end. A process that is told to end at once does not
        wait: the checkpoint before is whole.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(save,), name="save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Whether it went well, if it is over."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until it is over."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:  # raised again where somebody hears it
            self._error = error
