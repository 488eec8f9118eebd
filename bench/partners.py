"""How the policies of finished runs fare with partners: rows in results/partners.csv, a table for README.

    python -m bench.partners runs/deal runs/deal-1 --partners start scripted runs/deal-1 --dialogues 300

Each run is measured on the held-out contexts of its own seed, with itself and with each partner in both
seats, with either side first; its start is measured in its place. `scripted` is every character of the game,
and a run that is named as a partner is left out where it would meet itself.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_game
from duologue.grpo.config import load_config
from duologue.grpo.crossplay import CrossPlay, Interval, Player
from duologue.grpo.partners import START, in_full, load_player, start_of
from duologue.grpo.policy import use_device
from duologue.rollout.games.catalogue import GAMES
from duologue.rollout.games.game import Measure

from bench.common import RESULTS, append_rows

NAME = "partners"
MEASURES: dict[str, Measure] = {key: m for game in GAMES.values() for key, m in game.compared.items()}
Pairs = list[tuple[Player, Player]]
Row = dict[str, Any]


def pairings(players: dict[str, Player], partners: Sequence[Player]) -> Iterator[tuple[Row, Player, Pairs]]:
    """(what a row says of it, who is measured, the pairings of seats)."""
    for name, player in players.items():
        yield {"player": name, "with": "itself", "seat": "both"}, player, [(player, player)]
        for partner in partners:
            if player is partner:
                continue
            seats = {"1": [(player, partner)], "2": [(partner, player)]}
            for seat, pairs in {**seats, "both": [*seats["1"], *seats["2"]]}.items():
                known = Path(partner.name).name if Path(partner.name).exists() else partner.name
                yield {"player": name, "with": known, "seat": seat}, player, pairs


def rows_of(path: Path, names: Sequence[str], dialogues: int) -> list[Row]:
    """Of one run."""
    config = load_config(str(path / "config.toml"))
    use_device(config)
    game, first = build_game(config), start_of(path)
    others = [name for name in in_full(names, game) if Path(name).resolve() != path.resolve()]
    players = {"trained": load_player(str(path), config, game, first)}
    players[START] = load_player(START, config, game, first)
    partners = [players[n] if n == START else load_player(n, config, game, first) for n in others]
    held = CrossPlay(config, game, [*players.values(), *partners], dialogues)
    rows = []
    for row, player, pairs in pairings(players, partners):
        values = held.intervals(held.fares(pairs, player))
        played = [held.pairing(*pair) for pair in pairs]
        row = {"game": game.name, "run": path.name, "seed": config.train.seed, **row}
        for key in MEASURES:
            row |= {f"{key}{end}": shown(values.get(key), end) for end in ("", "_low", "_high")}
        row["contexts"] = dialogues
        row["dialogues"] = sum(pairing.dialogues for pairing in played)
        row["unscored"] = sum(pairing.unscored for pairing in played)
        rows.append(row)
    return rows


def shown(value: Interval | None, end: str) -> float | str:
    """A mean, or an end of its interval; "" where the game has no such measure or nothing counts in it."""
    number = value[end.removeprefix("_") or "value"] if value else None
    return "" if number is None else round(number, 4)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """In Markdown, with the measures that these games have."""
    present = {key: m for key, m in MEASURES.items() if m.short and any(row[key] != "" for row in rows)}
    names = ("run", "player", "with", "seat")
    yield f"| {' | '.join([*names, *(m.short for m in present.values())])} |"
    yield "|---" * (len(names) + len(present)) + "|"
    for row in rows:
        cells = [m.format.format(row[key]) if row[key] != "" else "" for key, m in present.items()]
        yield f"| {' | '.join([*(row[name] for name in names), *cells])} |"


def check_columns(names: Sequence[str]) -> None:
    """Stop when the file has the columns of other games: rows are appended."""
    path = RESULTS / f"{NAME}.csv"
    with contextlib.suppress(FileNotFoundError), open(path, newline="") as file:
        header = next(csv.reader(file))
        if missing := set(names) - set(header):
            raise SystemExit(f"{path} has no column {', '.join(sorted(missing))}: move it away")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--partners", nargs="+", default=["start", "scripted"], metavar="PARTNER")
    parser.add_argument("--dialogues", type=int, default=300, help="of a pairing, for each opener")
    parser.add_argument("--dry", action="store_true", help="write no rows")
    options = parser.parse_args()
    check_columns([*MEASURES])
    rows = [row for path in options.runs for row in rows_of(path, options.partners, options.dialogues)]
    if not options.dry:
        append_rows(NAME, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
