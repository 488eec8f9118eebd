"""`duologue eval`: a checkpoint measured with itself, or players with each other in both seats.

Dilemmas are measured by a judge (compare.py). In games with rules `--against` gives a table of both with
themselves and with each other, and several players the whole matrix.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from duologue.grpo.build import build_engine, build_game
from duologue.grpo.checkpoints import checkpoint_of
from duologue.grpo.commands.compare import compare, table
from duologue.grpo.config import Config
from duologue.grpo.console import Progress, formatted
from duologue.grpo.crossplay import CrossPlay, Interval, Player
from duologue.grpo.evaluate import evaluate
from duologue.grpo.partners import SCRIPTED, in_full, load_player, start_of, weights_of
from duologue.grpo.policy import load_policy, use_device
from duologue.grpo.run_dir import compact, finite
from duologue.model.atomic import write_file
from duologue.rollout.games.dilemma import DilemmaSettings
from duologue.rollout.games.game import Measure
from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
SUMMARISED = ("trained", "start")


def run(options: argparse.Namespace, config: Config) -> int:
    use_device(config)
    if isinstance(config.game, DilemmaSettings):
        return _dilemmas(options, config)
    if options.against is None and len(options.players) == 1:
        return _alone(options, config)
    return _together(options, config)


def conditions(config: Config) -> str:
    """How the evaluation held its dialogues."""
    e = config.eval
    how = "greedy" if e.temperature == 0 else f"sampled at temperature {e.temperature:g}"
    return f"{e.split} dialogues, {how}, seed {config.train.seed}"


def _alone(options: argparse.Namespace, config: Config) -> int:
    path = Path(options.players[0])
    model, tokenizer = load_policy(checkpoint_of(path), config)
    game = build_game(config)
    metrics, dialogues = evaluate(build_engine(config, model), tokenizer, game, config, None)
    _write_dialogues(options, [d.record(stage="eval") for d in dialogues])
    Progress(measures=game.measures_among(metrics)).results({path.name: metrics}, conditions(config))
    return _write(options, {**_settings(config), **metrics})


def _dilemmas(options: argparse.Namespace, config: Config) -> int:
    """Both held-out sets, greedy and sampled, and the answers of another checkpoint beside them."""
    if options.greedy:
        raise ValueError("--greedy: dilemmas are always measured both greedy and sampled (eval.temperature)")
    if options.save_dialogues:
        raise ValueError("--save-dialogues: accepted is a game whose rules score it; dilemmas write --json")
    if len(options.players) > 1:
        accepted = "one checkpoint with dilemmas, and with --against another"
        raise ValueError(f"{' '.join(options.players)}: accepted is {accepted}")
    names = [name for name in (options.players[0], options.against) if name]
    start = start_of(Path(names[0]))
    paths = [weights_of(name, start) for name in names]
    if len(paths) == 2 and paths[0].resolve() == paths[1].resolve():
        raise ValueError(
            f"--against {options.against}: accepted is another checkpoint than the one that is measured"
        )
    result = compare(
        config, {name: load_policy(path, config) for name, path in zip(names, paths, strict=True)}
    )
    Console(highlight=False).print(table(result, names))
    return _write(options, {"against": options.against, **result})


def _settings(config: Config) -> Row:
    e = config.eval
    return {"split": e.split, "seed": config.train.seed, "temperature": e.temperature}


def _write(options: argparse.Namespace, measures: Row) -> int:
    """The file that --json names."""
    if options.json:
        row = {"checkpoint": options.players[0], **measures}
        write_file(options.json, json.dumps(finite(row), indent=2).encode())
    return 0


def _records(held: CrossPlay) -> list[Row]:
    return [
        d.record(stage="eval", between=[pairing.first.name, pairing.second.name])
        for pairing in held.pairings
        for d in pairing.held
    ]


def _write_dialogues(options: argparse.Namespace, records: Iterable[Row]) -> None:
    """The file that --save-dialogues names, a line each as in a run's dialogues.jsonl."""
    if options.save_dialogues:
        lines = "".join(f"{compact(record)}\n" for record in records)
        write_file(options.save_dialogues, lines.encode())


# ---- players of a game with rules --------------------------------------------------------------------------


def _together(options: argparse.Namespace, config: Config) -> int:
    """`--against`: a table of each player with each partner; otherwise the matrix."""
    game, console = build_game(config), Console(highlight=False, markup=False)
    start = start_of(Path(options.players[0]))
    partners = in_full([options.against] if options.against else [], game)
    names = in_full(options.players, game)
    players = [load_player(name, config, game, start) for name in names]
    others = [load_player(name, config, game, start) for name in partners]
    held = CrossPlay(config, game, [*players, *others], config.eval.dialogues)
    console.print(f"{conditions(config)}; {config.eval.dialogues} contexts, 95 % intervals over them")
    rows: list[Row] = []
    if others:
        for player in players:
            for other in others:
                console.print(duel(held, player, other))
                rows.append(duel_row(held, player, other))
        _write_dialogues(options, _records(held))
        return _write(options, {"against": options.against, **_settings(config), "compared": rows})
    for key, measure in game.compared.items():
        console.print(matrix(held, key, measure))
    _write_dialogues(options, _records(held))
    return _write(options, {**_settings(config), "pairings": matrix_rows(held)})


def in_turn(a: Player, b: Player) -> list[tuple[Player, Player]]:
    """Both seats of two players."""
    return [(a, b), (b, a)]


def duel_columns(held: CrossPlay, a: Player, b: Player) -> dict[str, dict[str, Interval]]:
    """What A sees of each pairing, and B of the one with itself; the last column is what A with B has more
    than B with B, both seats together.
    """
    together, itself = held.fares(in_turn(a, b), a), held.fares([(b, b)], b)
    return {
        "A with A": held.intervals(held.pairing(a, a).seen[0]),
        "B with B": held.intervals(held.pairing(b, b).seen[0]),
        "A as side 1 with B": held.intervals(held.pairing(a, b).seen[0]),
        "A as side 2 with B": held.intervals(held.pairing(b, a).seen[1]),
        "A with B": held.intervals(together),
        "A with B less B with B": held.differences(together, itself),
    }


def duel_row(held: CrossPlay, a: Player, b: Player) -> Row:
    return {"A": a.name, "B": b.name, **duel_columns(held, a, b)}


def duel(held: CrossPlay, a: Player, b: Player) -> Table:
    """What `duel_columns` has, for people."""
    columns = duel_columns(held, a, b)
    del columns["A with B"]  # of both seats, which stand there
    shown = _table(f"A = {a.name}, B = {b.name}", columns)
    for key, measure in held.game.compared.items():
        cells = [cell(column[key], measure, signed="less" in name) for name, column in columns.items()]
        shown.add_row(measure.heading, *cells)
    return shown


def cell(value: Interval, measure: Measure, signed: bool = False) -> str:
    """A mean, and its interval in the next line with fewer digits; of a difference with signs."""
    sign, digits = "+" if signed else "", ".0%" if measure.is_share else ".2f"
    mean = formatted(measure.format.replace(":", f":{sign}"), value["value"])
    low, high = (formatted(f"{{:{sign}{digits}}}", value[key]) for key in ("low", "high"))
    return mean if value["value"] is None else f"{mean}\n{low}..{high}"


def _table(title: str, columns: Iterable[str]) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right", overflow="fold")  # in a narrow terminal, whole
    return shown


def matrix(held: CrossPlay, key: str, measure: Measure) -> Table:
    """A measure of every pairing, as side 1 sees it."""
    title = f"{measure.heading}, as side 1 (left) with side 2 (above)"
    shown = _table(title, [player.name for player in held.players])
    for first in held.players:
        values = [held.intervals(held.pairing(first, second).seen[0])[key] for second in held.players]
        shown.add_row(first.name, *(formatted(measure.format, value["value"]) for value in values))
    return shown


def matrix_rows(held: CrossPlay) -> list[Row]:
    """Every pairing of seats, as both sides see it."""
    pairings = [held.pairing(first, second) for first in held.players for second in held.players]
    return [
        {
            "side_1": pairing.first.name,
            "side_2": pairing.second.name,
            "dialogues": pairing.dialogues,
            "unscored": pairing.unscored,
            "of_side_1": held.intervals(pairing.seen[0]),
            "of_side_2": held.intervals(pairing.seen[1]),
        }
        for pairing in pairings
    ]


# ---- the end of a run --------------------------------------------------------------------------------------


def partners_table(rows: Mapping[str, Row], measures: Mapping[str, Measure]) -> Table:
    """What summary.json has of the trained policy with each partner, and of the start in its place."""
    title = "trained policy with each partner, both seats; in brackets the start in its place"
    shown = _table(title, [measure.short for measure in measures.values() if measure.short])
    for name, row in rows.items():
        cells = []
        for key, measure in measures.items():
            trained, start = (formatted(measure.format, row[who][key]["value"]) for who in SUMMARISED)
            if measure.short:
                cells.append(f"{trained}\n({start})")
        shown.add_row(name.removeprefix(f"{SCRIPTED}:"), *cells)
    return shown
