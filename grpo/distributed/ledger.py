"""One ledger for the ranks of a node: whoever needs an answer first asks, the others find it in the file."""

from __future__ import annotations

import socket
from pathlib import Path

from duologue.grpo.distributed.world import Ranks
from duologue.rollout.judge.ledger import Ledger


class SharedLedger(Ledger):
    """Claims are in the run's store, by machine, and end with it: a question that was claimed by a rank that
    was killed is free in the run that resumes. What got no answer is free again in the next step.
    """

    def __init__(self, path: Path, world: Ranks) -> None:
        super().__init__(path)
        self.world = world

    def _key(self, what: str, key: str) -> str:
        return f"judge/{socket.gethostname()}/{what}/{self.world.round}/{key}"

    def claim(self, key: str) -> bool:
        return bool(self.world.store.add(self._key("claim", key), 1) == 1)

    def give_up(self, key: str, reason: str) -> None:
        self.world.store.set(self._key("given_up", key), reason or "no valid answer")

    def given_up(self, key: str) -> str | None:
        name = self._key("given_up", key)
        return self.world.store.get(name).decode() if self.world.store.check([name]) else None
