"""A run as one HTML file that needs nothing else: results, curves, and dialogues with both private sides.

Works on a run that is still going or was cut off: what exists is shown. All text of the run is escaped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from duologue.grpo.checkpoints import STATE, latest_checkpoint
from duologue.grpo.commands import inspector, partners, watched
from duologue.grpo.commands.charts import HEIGHT, LEFT, RIGHT, WIDTH, Chart, chart, is_number
from duologue.grpo.commands.records import (
    UNLIKE_A_RUN,
    Record,
    any_tokenizer,
    config_text,
    template,
    unlike_a_run,
    with_numbers,
)
from duologue.grpo.console import COUNT, UNKNOWN, formatted
from duologue.grpo.run_dir import iter_lines, read_lines
from duologue.grpo.settings import typed
from duologue.model.atomic import write_file
from duologue.model.settings import keys
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.games.catalogue import kind_in
from duologue.rollout.games.game import Game, Measure, Published

TEMPLATE = "report.html.j2"
SHOWN = 12  # dialogues of a policy, the first ones: not chosen
FAILED_SHOWN = 4
POLICIES = {"warm_start": "warm start", "trained": "trained"}
# stage, title, metric -> label, whether a share; those of the game's own measures come first
CHARTS: tuple[tuple[str, str, dict[str, str], bool], ...] = (
    ("selfplay", "Entropy per token", {"entropy": "nats"}, False),
    ("selfplay", "KL to the start", {"kl_start": "nats per token"}, False),
    ("selfplay", "Rollout against trainer", {"mismatch": "largest log-prob difference"}, False),
    (
        "selfplay",
        "Tokens per second",
        {"rollout_tokens_per_s": "rollout", "update_tokens_per_s": "update"},
        False,
    ),
    (
        "selfplay",
        "Groups without variance",
        {"no_variance_share": "of all", "clip_share": "clipped tokens"},
        True,
    ),
    (
        "selfplay",
        "Groups that teach nothing",
        {"flat_share_before": "as drawn", "flat_share_after": "after grpo.resample"},
        True,
    ),
    ("selfplay", "Gradient norm", {"grad_norm": "before clipping"}, False),
    ("imitation", "Imitation loss", {"loss": "nats per token"}, False),
)


def run(options: argparse.Namespace) -> int:
    inspected = ""
    if options.inspect:
        inspected = inspector.PAGE
        inspector.write_page(options.run_dir, options.run_dir / inspected)
    print(write_report(options.run_dir, inspected))
    return 0


def write_report(run_dir: Path, inspected: str = "") -> Path:
    """Write `report.html` into the run directory; ValueError when there is nothing to report. `inspected`
    names a page of all dialogues beside it, which it links.
    """
    path = Path(run_dir) / "report.html"
    write_file(path, _page(path.parent, inspected=inspected).encode())
    return path


def check_lines(run_dir: Path) -> None:
    """Before a run goes on: what it has recorded so far will make a report in the end."""
    _page(run_dir, ended=False)


def _page(run_dir: Path, ended: bool = True, inspected: str = "") -> str:
    try:
        return template(TEMPLATE).render(gather(run_dir, ended), inspected=inspected)
    except UNLIKE_A_RUN as error:
        if str(run_dir) in str(error):
            raise
        raise unlike_a_run(run_dir, error) from error


def gather(run_dir: Path, ended: bool = True) -> Record:
    """Everything that the template shows; of a run that is to go on not its summary."""
    toml, config = config_text(run_dir)
    game = kind_in(config["game"])
    metrics = read_lines(run_dir / "metrics.jsonl")
    summary = _summary(run_dir, ended)
    policies, recent = _dialogues(run_dir / "dialogues.jsonl")
    tokenizer = any_tokenizer(run_dir)
    sections = _sections(policies, recent)
    for rows in sections.values():
        for row in rows:
            row["columns"] = [(name, _dialogue(game, record, tokenizer)) for name, record in row["columns"]]
    return {
        "name": run_dir.resolve().name,
        "facts": _facts(config, metrics, summary),
        "finished": (run_dir / "summary.json").is_file(),
        "results": _results(game, config, summary),
        "failures": _failures(game, summary),
        "crossplay": _crossplay(game, summary),
        "language": summary.get("ability", {}).get("line", ""),
        "partners": partners.table(metrics),
        "charts": [*_charts(game, metrics), *watched.charts(metrics)],
        "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT},
        "sections": sections,
        "coloured": tokenizer is not None,
        "toml": toml,
    }


def _summary(run_dir: Path, ended: bool) -> Record:
    """summary.json, or what the newest checkpoint of an unfinished run knows of it."""
    found = run_dir / "summary.json"
    if not (ended and found.is_file()):
        latest = latest_checkpoint(run_dir)
        if latest is None:
            return {}
        found = latest / STATE
    try:
        summary: Record = json.loads(found.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is not valid JSON: {error}") from error
    return summary


def _dialogues(path: Path) -> tuple[dict[str, list[Record]], list[Record]]:
    """The last evaluation's dialogues of each policy, and the latest of self-play. Read once: the file may
    be large.
    """
    policies: dict[str, list[Record]] = {}
    recent: deque[Record] = deque(maxlen=SHOWN)
    for record in iter_lines(path):
        if record["stage"] != "eval":
            if not record.get("dropped"):
                recent.append(record)
            continue
        of_policy = policies.setdefault(record["policy"], [])
        if of_policy and of_policy[0]["step"] != record["step"]:
            of_policy.clear()
        of_policy.append(record)
    return policies, list(recent)


# ---- numbers -----------------------------------------------------------------------------------------------


def _facts(config: Record, metrics: Sequence[Record], summary: Record) -> list[tuple[str, str]]:
    steps = Counter(row["stage"] for row in metrics)
    seconds = summary.get("train_seconds") or sum(row.get("seconds") or 0 for row in metrics)
    facts = [
        ("game", ", ".join(config["game"][key] for key in ("name", "objective") if key in config["game"])),
        ("seed", str(config["train"]["seed"])),
        ("device", f"{config['model']['device']}, {config['model']['dtype']}"),
        ("training time", f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"),
        ("steps", f"{steps['imitation']} imitation, {steps['selfplay']} self-play"),
    ]
    if is_number(summary.get("parameters")):
        facts.append(("parameters", f"{summary['parameters'] / 1e6:.2f} M"))
    peak = max((row.get("peak_memory_bytes") or 0 for row in metrics), default=0)
    if peak:
        facts.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    facts += watched.facts(metrics, summary)
    if metrics:
        facts.append(("reported", time.strftime("%Y-%m-%d %H:%M")))
    return facts


def _results(game: type[Game], config: Record, summary: Record) -> Record:
    """The table of the policies, and what others reach where that is known."""
    columns = {label: summary[key] for key, label in POLICIES.items() if summary.get(key)}
    published = _published(game, config["game"]) if columns else Published()
    rows = []
    names = dict.fromkeys(key for column in columns.values() for key in column)
    for key, measure in {**game.measures_among(names), **COUNT}.items():
        if not columns or not all(key in column for column in columns.values()):
            continue
        form = measure.format
        values = [formatted(form, column[key]) for column in columns.values()]
        change = ""
        if len(columns) == 2 and key not in COUNT and UNKNOWN not in values:
            change = _change(summary["trained"][key] - summary["warm_start"][key], measure)
        others = [formatted(form, c[key]) if key in c else "" for c in published.columns.values()]
        rows.append((measure.heading, values, change, others))
    return {"columns": [*columns], "others": [*published.columns], "source": published.source, "rows": rows}


def _published(game: type[Game], section: Record) -> Published:
    known = [field for field in keys(game.Settings) if field.name in section]
    values = {field.name: typed(field.name, section[field.name], field.default) for field in known}
    return game.published(game.Settings(**values))


def _change(difference: float, measure: Measure) -> str:
    if measure.is_share:
        return f"{100 * difference:+.1f} points"
    return f"{difference:+{measure.format[2:-1]}}"


def _failures(game: type[Game], summary: Record) -> list[tuple[str, list[float]]]:
    """(kind in words, share of all dialogues for each policy) of the kinds that occurred."""
    columns = [summary[key] for key in POLICIES if summary.get(key)]
    kinds = [key for key in (columns[0] if columns else {}) if key.startswith("failure_")]
    rows = [
        (
            game.failure_in_words(kind.removeprefix("failure_")),
            [column.get(kind) or 0.0 for column in columns],
        )
        for kind in kinds
    ]
    return [row for row in rows if any(row[1])]


def _crossplay(game: type[Game], summary: Record) -> Record:
    """The table of the policy with each partner: (partner, cells) of trained, the start in its place, and the
    difference with its interval.
    """
    measures = {key: measure for key, measure in game.compared.items() if measure.short}
    rows = []
    for name, row in summary.get("partners", {}).items():
        cells = []
        for key, measure in measures.items():
            form, signed = measure.format, measure.format.replace(":", ":+")
            trained, start = (formatted(form, row[who][key]["value"]) for who in ("trained", "start"))
            low, high = (formatted(signed, row["difference"][key][end]) for end in ("low", "high"))
            difference = formatted(signed, row["difference"][key]["value"])
            cells.append((trained, start, f"{difference}, 95 % interval {low} to {high}"))
        rows.append((name, cells))
    return {"columns": [measure.short for measure in measures.values()], "rows": rows}


def _charts(game: type[Game], metrics: Sequence[Record]) -> list[Chart]:
    shown = {key: measure for key, measure in game.measures.items() if measure.short}
    values = {"reward": "reward", **{key: m.short for key, m in shown.items() if not m.is_share}}
    shares = {key: m.short for key, m in shown.items() if m.is_share}
    of_game = [
        ("selfplay", " and ".join(drawn.values()), drawn, drawn is shares)
        for drawn in (values, shares)
        if drawn
    ]
    charts = partners.charts(metrics)
    for stage, title, labels, percent in (*of_game, *CHARTS):
        rows = [row for row in metrics if row["stage"] == stage]
        drawn = chart(title[0].upper() + title[1:], rows, labels, percent)
        if drawn is not None:
            charts.append(drawn)
    return charts


# ---- dialogues ---------------------------------------------------------------------------------------------


def _sections(policies: Mapping[str, list[Record]], recent: list[Record]) -> dict[str, list[Record]]:
    """Heading -> rows; a row is a scenario with the dialogue of each policy on it."""
    before, after = policies.get("warm_start", []), policies.get("trained", [])
    if not before and not after:
        return (
            {"The latest of self-play": [_row({"self-play": record}) for record in recent]} if recent else {}
        )
    pairs = list(zip_longest(before, after))
    first = [row for pair in pairs[:SHOWN] for row in _rows(*pair)]
    failed = [pair for pair in pairs[SHOWN:] if pair[1] and not pair[1]["outcome"]["agreed"]][:FAILED_SHOWN]
    sections = {f"The first {min(SHOWN, len(pairs))} of {len(pairs)}, not chosen": first}
    if failed:
        sections["The next that the trained policy failed"] = [row for pair in failed for row in _rows(*pair)]
    return sections


def _rows(before: Record | None, after: Record | None) -> list[Record]:
    both = {"warm start": before, "trained": after}
    present = {name: record for name, record in both.items() if record}
    same = len({record["scenario"]["id"] for record in present.values()}) == 1
    return [_row(present)] if same else [_row({name: record}) for name, record in present.items()]


def _row(records: Mapping[str, Record]) -> Record:
    scenario = next(iter(records.values()))["scenario"]
    return {"id": scenario["id"], "shared": scenario.get("shared"), "columns": list(records.items())}


def _dialogue(game: type[Game], record: Record, tokenizer: Tokenizer | None) -> Record:
    """What the template shows of a dialogue, in the game's own words."""
    record = with_numbers(record)
    reward = record["reward"]
    turns = [{"side": t["role"], "kind": t["kind"], "pieces": _pieces(t, tokenizer)} for t in record["turns"]]
    shown = game.shown(record)
    measures = shown["measures"]
    if reward is not None:
        same = reward[0] == reward[1]
        measures.append(("reward {:.2f}" if same else "reward {:.2f}, {:.2f}").format(*reward))
    return {
        "talk": [turn for turn in turns if turn["kind"] != "final"],
        "finals": sorted((turn for turn in turns if turn["kind"] == "final"), key=lambda turn: turn["side"]),
        "agreed": bool((record["outcome"] or {}).get("agreed")),
        "shown": shown,
        "measures": measures,
    }


def _pieces(turn: Record, tokenizer: Tokenizer | None) -> list[tuple[str, int, str]]:
    """(text, how surprising from 0 to 5, what the pointer is shown) of each token; the whole text when they
    are unknown.

    A token without text, as the one that ends a turn, has the text "".
    """
    if tokenizer is None or turn["logprobs"] is None:
        return [(turn["text"], 0, "")]
    pieces, before = [], ""
    for i, logprob in enumerate(turn["logprobs"]):
        text = tokenizer.decode(turn["token_ids"][: i + 1])
        split = text.endswith("\ufffd")  # in the midst of a character
        piece = "" if split else text[len(before) :]
        before = before if split else text
        shown = piece.lstrip() if i == 0 else piece
        if not is_number(logprob):
            pieces.append((shown, 0, "log p is not known"))
            continue
        level = min(5, math.floor(-logprob / 0.7)) if logprob < 0 else 0
        pieces.append((shown, level, f"log p {logprob:.3f}, p {math.exp(logprob):.1%}"))
    return pieces
