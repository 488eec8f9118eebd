"""TextArena's environments, held to moves that they name as legal: a policy from nothing then gets beyond its
first move.
"""

from __future__ import annotations

import re
from typing import Any

from duologue.rollout.games.textarena_game import TextArenaGame


class Held(TextArenaGame):
    def observe(self) -> tuple[int, str]:
        side, text = super().observe()
        offered = text.rpartition("vailable ")[2]
        self._legal = re.findall(r"'(\[\w+\])'", offered) or None
        return side, text

    def legal(self) -> list[str] | None:
        return self._legal


class Kuhn(Held):
    def __init__(self, **options: Any) -> None:
        super().__init__("KuhnPoker-v0", **options)


class TicTacToe(Held):
    def __init__(self) -> None:
        super().__init__("TicTacToe-v0")


class Negotiation(TextArenaGame):
    def __init__(self) -> None:
        super().__init__("SimpleNegotiation-v0-short")

    def legal(self) -> list[str]:
        offers = [f"[Offer: {n} Ore -> {n + 1} Wheat]" for n in (1, 2, 30)]
        return [*offers, "[Accept]", "[Deny]", "[Player 0] no"]
