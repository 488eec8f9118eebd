"""`duologue data`: look at the texts that dilemmas are made of, check files of one's own, let a model write
more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.model.atomic import write_file
from duologue.rollout.games.texts import NEEDS, SHIPPED, TIERS, Row, kind_of, likeness, read
from duologue.rollout.judge.asking import Ask
from duologue.rollout.judge.wording import spoken
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from duologue.rollout.judge.endpoint import ChatEndpoint

MOST_ALIKE = 0.3  # above this two texts count as one
WORDS = (20, 120)  # of a dilemma that a model wrote
TRIES = 4  # per dilemma that is wanted
REQUEST = """Write one moral or practical dilemma of the tier "{tier}" in 40 to 75 words: plain English, \
one paragraph, concrete people, numbers and a deadline, two defensible sides, no solution. \
It must have nothing in common with these:

{examples}

Answer with the text of the dilemma alone."""


def add_parser(commands: Any) -> Any:
    parser = commands.add_parser(
        "data", help="list, check or extend the dilemmas, personas, tasks and questions"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    show = verbs.add_parser("list", help="show texts")
    show.add_argument("--kind", choices=list(NEEDS), default="dilemmas")
    show.add_argument("--file", type=Path, help="of one's own (default: the one that comes with the package)")
    show.add_argument("--tier", choices=TIERS)
    show.add_argument("--tag")
    show.add_argument("--situation", help="the slug of a situation, which its variations share")
    show.add_argument("--limit", type=int, default=20, help="0 for all")
    show.add_argument("--json", action="store_true", help="the lines as they stand in the file")
    check = verbs.add_parser("check", help="validate files and measure how alike their texts are")
    check.add_argument("files", nargs="*", type=Path, help="(default: those that come with the package)")
    script = verbs.add_parser("script", help="print dialogues of a game's scripted negotiators")
    script.add_argument("game", choices=("deal", "price", "priorities"))
    script.add_argument("-n", type=int, default=5, help="dialogues")
    script.add_argument("--telling", choices=("plain", "english"), default="english")
    script.add_argument("--seed", type=int, default=0)
    script.add_argument(
        "--characters", nargs="+", default=[], metavar="NAME", help="(default: the game's own)"
    )
    write = verbs.add_parser("write", help="let a model write dilemmas through an OpenAI-compatible server")
    write.add_argument("--url", required=True, help="for example http://127.0.0.1:8000/v1")
    write.add_argument("--model", default="default")
    write.add_argument("--tier", choices=TIERS, required=True)
    write.add_argument("--count", type=int, required=True)
    write.add_argument("--out", type=Path, required=True, help="a .jsonl file; what is there stays")
    write.add_argument(
        "--key-env", default="DUOLOGUE_JUDGE_KEY", help="the environment variable that holds the API key"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    return {"list": _list, "check": _check, "script": _script, "write": _write}[options.verb](options)


def _list(options: argparse.Namespace) -> int:
    if options.limit < 0:
        raise ValueError(f"--limit {options.limit}: accepted is 0 (all) or more")
    rows = [
        row
        for row in read(options.file or SHIPPED[options.kind], NEEDS[options.kind])
        if options.tier in (None, row.get("tier"))
        and options.situation in (None, row.get("situation"))
        and (options.tag is None or options.tag in row.get("tags", []))
    ]
    shown = rows[: options.limit or None]
    if options.json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in shown))
        return 0
    console = Console(highlight=False, markup=False)
    for row in shown:
        console.print(f"{row['id']}  [{', '.join(row.get('tags', []))}]", style="bold")
        console.print(row.get("text", ""), end="\n" if "text" in row else "")
        for side in ("first", "second"):
            if side in row:
                console.print(f"  {row[side]['name']}: {row[side]['instructions']}")
    console.print(
        f"{len(shown)} of {len(rows)} {options.kind}"
        + ("" if len(shown) == len(rows) else "; --limit 0 shows all")
    )
    return 0


def _script(options: argparse.Namespace) -> int:
    """Scripted dialogues with what each side was told."""
    from duologue.grpo.config import load_config
    from duologue.rollout.games.catalogue import corpus, kind_of, partners

    if options.n < 1:
        raise ValueError(f"-n {options.n}: accepted is 1 or more")
    known = partners(options.game)
    for name in options.characters:
        if name not in known:
            raise ValueError(f"--characters {name}: accepted is {', '.join(known)}")
    config = load_config(options.game, [f"game.telling={options.telling}"])
    game = kind_of(config.game)(config.game)
    console = Console(highlight=False, markup=False)
    for n, dialogue in enumerate(corpus(game, options.n, options.seed, options.characters), 1):
        first, second = dialogue.temperaments
        console.print(f"{n}. {dialogue.scenario.id}: {first} and {second}", style="bold")
        for side, told in enumerate(dialogue.scenario.private_text, 1):
            console.print(f"   told to side {side}: {told}", soft_wrap=True)
        for side, text, kind in dialogue.turns:
            console.print(f"   {side + 1}{'*' * (kind == 'final')}> {text}", soft_wrap=True)
        console.print(f"   {game.verdict(asdict(dialogue.outcome))}", end="\n\n")
    return 0


def _check(options: argparse.Namespace) -> int:
    kinds = {path: kind_of(path) for path in options.files} or {path: kind for kind, path in SHIPPED.items()}
    held: list[tuple[str, Row]] = []
    table = Table(title="texts", title_justify="left")
    for heading in ("file", "kind", "rows", "tiers (situations)"):
        table.add_column(heading)
    for path, kind in kinds.items():
        rows = read(path, NEEDS[kind])
        held += [(f"{path.name}: {row['id']}", row) for row in rows if "text" in row]
        parts = []
        for tier, n in Counter(row["tier"] for row in rows if "tier" in row).items():
            situations = {row["situation"] for row in rows if row.get("tier") == tier and "situation" in row}
            parts.append(f"{tier} {n} ({len(situations)})" if situations else f"{tier} {n}")
        table.add_row(path.name, kind, str(len(rows)), ", ".join(parts))
    console = Console(highlight=False, markup=False)
    console.print(table)
    pairs = sorted(likeness([row["text"] for _, row in held]), reverse=True)
    console.print(
        "likeness of texts (Jaccard index of three-word sequences): "
        f"at most {pairs[0][0] if pairs else 0:.3f}"
    )
    for value, i, j in pairs[:3]:
        console.print(f"  {value:.3f}  {held[j][0]}  and  {held[i][0]}")
    alike = [pair for pair in pairs if pair[0] > MOST_ALIKE]
    for value, i, j in alike:
        console.print(
            f"too much alike ({value:.3f}, accepted is up to {MOST_ALIKE}): {held[j][0]} and {held[i][0]}"
        )
    return int(bool(alike))


def _write(options: argparse.Namespace) -> int:
    if options.count < 1:
        raise ValueError(f"--count {options.count}: accepted is 1 or more")
    known = read(SHIPPED["dilemmas"], NEEDS["dilemmas"])
    rows = read(options.out, NEEDS["dilemmas"]) if options.out.exists() else []
    before = len(rows)
    endpoint = _endpoint(options)
    try:
        refused = _extend(rows, known, options, endpoint)
    finally:
        endpoint.close()
    written = len(rows) - before
    limits = f"too much alike, or not of {WORDS[0]} to {WORDS[1]} words"
    console = Console(highlight=False, markup=False)
    console.print(f"{options.out}: {written} dilemmas written, {refused} refused ({limits})")
    return int(written < options.count)


def _extend(rows: list[Row], known: list[Row], options: argparse.Namespace, endpoint: ChatEndpoint) -> int:
    """Write to `options.out` until it has `options.count` dilemmas more or the tries are used up; how
    many were refused."""
    ids = {row["id"] for row in rows}
    goal = len(rows) + options.count
    refused = 0
    for turn in range(TRIES * options.count):
        same_tier = [row for row in (*known, *rows) if row.get("tier") == options.tier]
        examples = [same_tier[(turn * 7 + i * 31) % len(same_tier)]["text"] for i in range(3)]
        request = REQUEST.format(tier=options.tier.replace("_", " "), examples="\n\n".join(examples))
        text = " ".join(_ask(endpoint, request, options).split())
        texts = [*(row["text"] for row in (*known, *rows)), text]
        nearest = max((value for value, i, _ in likeness(texts) if i == len(texts) - 1), default=0.0)
        if nearest > MOST_ALIKE or not WORDS[0] <= len(text.split()) <= WORDS[1]:
            refused += 1
            continue
        names = (f"{options.tier}/written/{n}" for n in itertools.count(1))
        name = next(name for name in names if name not in ids)
        ids.add(name)
        rows.append({"id": name, "tier": options.tier, "tags": ["written"], "text": text})
        write_file(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        if len(rows) == goal:
            break
    return refused


def _endpoint(options: argparse.Namespace) -> ChatEndpoint:
    from duologue.rollout.judge.endpoint import ChatEndpoint  # the other commands need no HTTP client

    key = os.environ.get(options.key_env, "").strip()
    limits: dict[str, Any] = {"concurrency": 1, "attempts": 6, "timeout_s": 120.0, "deadline_s": 720.0}
    return ChatEndpoint(options.url, options.model, api_key=key, **limits)


def _ask(endpoint: ChatEndpoint, prompt: str, options: argparse.Namespace) -> str:
    """What the server answers."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 1.0, "max_tokens": 400}
    answer: Future[tuple[str | None, str]] = Future()

    def done(content: str | None, reason: str) -> None:
        answer.set_result((content, reason))

    endpoint.ask(Ask(kind="dilemma", text=json.dumps(body), check=spoken, done=done))
    content, reason = answer.result()
    if content is None:
        status = re.search(r"HTTP [345]\d+", reason)
        raise RuntimeError(
            f"{options.url} gave no dilemma: {status[0] if status else reason}; "
            f"what was written before is in {options.out}"
        )
    return spoken(content)
