"""`duologue data`: look at the texts that dilemmas are made of, check files of one's own, let a model write
more.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from duologue.model.atomic import write_file
from duologue.rollout.games.texts import NEEDS, SHIPPED, TIERS, Row, kind_of, likeness, read
from rich.console import Console
from rich.table import Table

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
    return {"list": _list, "check": _check, "write": _write}[options.verb](options)


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


def _check(options: argparse.Namespace) -> int:
    kinds = {path: kind_of(path) for path in options.files} or {path: kind for kind, path in SHIPPED.items()}
    held: list[tuple[str, Row]] = []
    table = Table(title="texts", title_justify="left")
    for heading in ("file", "kind", "rows", "tiers (situations)"):
        table.add_column(heading)
    for path, kind in kinds.items():
        rows = read(path, NEEDS[kind])
        held += [(f"{path.name}: {row['id']}", row) for row in rows if "text" in row]
        tiers = Counter(row["tier"] for row in rows if "tier" in row)
        situations = {
            tier: len({row["situation"] for row in rows if row.get("tier") == tier and "situation" in row})
            for tier in tiers
        }
        parts = (
            f"{tier} {n}" + (f" ({situations[tier]})" if situations[tier] else "")
            for tier, n in tiers.items()
        )
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
    alike = [(value, i, j) for value, i, j in pairs if value > MOST_ALIKE]
    for value, i, j in alike:
        console.print(
            f"too much alike ({value:.3f}, accepted is up to {MOST_ALIKE}): {held[j][0]} and {held[i][0]}"
        )
    return int(bool(alike))


def _write(options: argparse.Namespace) -> int:
    if options.count < 1:
        raise ValueError(f"--count {options.count}: accepted is 1 or more")
    known = read(SHIPPED["dilemmas"], NEEDS["dilemmas"])
    own = read(options.out, NEEDS["dilemmas"]) if options.out.exists() else []
    console = Console(highlight=False, markup=False)
    ids = {row["id"] for row in own}
    written = refused = 0
    for turn in range(TRIES * options.count):
        same_tier = [row for row in (*known, *own) if row.get("tier") == options.tier]
        examples = "\n\n".join(
            row["text"] for row in (same_tier[(turn * 7 + i * 31) % len(same_tier)] for i in range(3))
        )
        text = " ".join(
            _ask(options, REQUEST.format(tier=options.tier.replace("_", " "), examples=examples)).split()
        )
        texts = [*(row["text"] for row in (*known, *own)), text]
        nearest = max((value for value, i, _ in likeness(texts) if i == len(texts) - 1), default=0.0)
        if nearest > MOST_ALIKE or not WORDS[0] <= len(text.split()) <= WORDS[1]:
            refused += 1
            continue
        name = next(
            f"{options.tier}/written/{n}" for n in range(1, 10**9) if f"{options.tier}/written/{n}" not in ids
        )
        ids.add(name)
        own.append({"id": name, "tier": options.tier, "tags": ["written"], "text": text})
        write_file(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own).encode())
        written += 1
        if written == options.count:
            break
    limits = f"too much alike, or not of {WORDS[0]} to {WORDS[1]} words"
    console.print(f"{options.out}: {written} dilemmas written, {refused} refused ({limits})")
    return int(written < options.count)


def _ask(options: argparse.Namespace, prompt: str) -> str:
    try:
        import httpx
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter
    except ModuleNotFoundError as error:
        raise ValueError(f"duologue data write needs {error.name}: pip install 'duologue[judge]'") from None

    def passing(error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code in (408, 429) or error.response.status_code >= 500
        return isinstance(error, (httpx.TransportError, LookupError, ValueError))

    key = os.environ.get(options.key_env, "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {
        "model": options.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 1.0,
        "max_tokens": 400,
    }
    url = options.url.rstrip("/") + "/chat/completions"
    waits = wait_exponential_jitter(initial=0.2, max=10)
    try:
        for attempt in Retrying(
            stop=stop_after_attempt(6), wait=waits, retry=retry_if_exception(passing), reraise=True
        ):
            with attempt:
                response = httpx.post(url, json=body, headers=headers, timeout=120)
                response.raise_for_status()
                return str(response.json()["choices"][0]["message"]["content"])
    except (httpx.HTTPError, LookupError, ValueError) as error:
        reason = (
            f"HTTP {error.response.status_code}"
            if isinstance(error, httpx.HTTPStatusError)
            else type(error).__name__
        )
        raise RuntimeError(
            f"{url} gave no dilemma: {reason}; what was written before is in {options.out}"
        ) from None
    raise AssertionError("tenacity raises when it gives up")
