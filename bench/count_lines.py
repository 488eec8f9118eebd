"""The yardstick of the product's Python: width, length of files and functions, tokens to a line.

    python bench/count_lines.py

A line of code is one that has a token of code: comments, docstrings and blank lines are not counted, nor are
the tokens that only give shape (indents, newlines). The sums are printed, not limited: a limit on lines is
met by width; a limit on tokens to a line asks for fewer ideas.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "model", "rollout", "grpo")
WIDTH, FILE_LINES, FUNCTION_LINES, KERNEL_LINES, TOKENS_PER_LINE = 110, 400, 50, 90, 10.5
SHAPE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
SKIP = "# fmt: " + "skip"


@dataclass(frozen=True, slots=True)
class Size:
    lines: int  # all of them
    code: int  # those with a token of code
    tokens: int


def docstrings(tree: ast.Module) -> set[tuple[int, int]]:
    """Where they begin: (line, column)."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owners = (
        node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node) is not None
    )
    return {(node.body[0].lineno, node.body[0].col_offset) for node in owners}


def size(text: str) -> Size:
    left_out = docstrings(ast.parse(text))
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SHAPE and token.start not in left_out
    ]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return Size(len(text.splitlines()), len(code), len(tokens))


def is_table(text: str) -> bool:
    """Whether a statement is a literal of rows, whose columns the formatter would break."""
    try:
        statement = ast.parse(text.strip()).body[0]
    except SyntaxError:
        return False
    value = getattr(statement, "value", None)
    items = value.values if isinstance(value, ast.Dict) else getattr(value, "elts", [])
    return len(items) > 1 and all(
        isinstance(i, ast.Tuple | ast.List | ast.Dict | ast.Constant) for i in items
    )


def unformatted(text: str) -> Iterator[str]:
    """Statements that are kept from the formatter and are no table."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        kept = isinstance(node, ast.stmt) and lines[(node.end_lineno or node.lineno) - 1].endswith(SKIP)
        if kept and not is_table(ast.get_source_segment(text, node) or ""):
            yield f"line {node.lineno} is no table, and kept from the formatter"


def faults(file: str, text: str) -> Iterator[str]:
    """What the yardstick refuses in one file of the product."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > WIDTH:
            yield f"line {number} is {len(line)} wide, at most {WIDTH}"
    if (lines := len(text.splitlines())) > FILE_LINES:
        yield f"{lines} lines, at most {FILE_LINES}"
    limit = KERNEL_LINES if file.startswith("kernels/") else FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                yield f"{node.name} has {length} lines, at most {limit}"
    yield from unformatted(text)


def product_files(root: Path) -> Iterator[Path]:
    for layer in LAYERS:
        yield from sorted((root / layer).rglob("*.py"))


def folder(root: Path, file: Path) -> str:
    return str(file.parent.relative_to(root))


def check(root: Path) -> list[str]:
    """All faults under `root`, the average of tokens to a line among them."""
    texts = {str(file.relative_to(root)): file.read_text("utf-8") for file in product_files(root)}
    found = [f"{file}: {fault}" for file, text in texts.items() for fault in faults(file, text)]
    sizes = [size(text) for text in texts.values()]
    average = sum(s.tokens for s in sizes) / max(sum(s.code for s in sizes), 1)
    if average > TOKENS_PER_LINE:
        found.append(f"{average:.1f} tokens to a line of code on average, at most {TOKENS_PER_LINE}")
    return found


def table(root: Path) -> Iterator[str]:
    """A row per folder, and their sum."""
    by_folder: dict[str, list[Size]] = {}
    for file in product_files(root):
        by_folder.setdefault(folder(root, file), []).append(size(file.read_text("utf-8")))
    rows = [*by_folder.items(), ("sum", [s for sizes in by_folder.values() for s in sizes])]
    yield f"{'folder':18} {'files':>5} {'lines':>7} {'of code':>7} {'tokens':>8} {'per line':>8}"
    for name, sizes in rows:
        lines, code, tokens = (sum(getattr(s, key) for s in sizes) for key in ("lines", "code", "tokens"))
        yield f"{name:18} {len(sizes):5} {lines:7,} {code:7,} {tokens:8,} {tokens / max(code, 1):8.2f}"


def badly_formatted(root: Path) -> list[str]:
    """What ruff's formatter would change."""
    command = [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "."]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return (
        [line for line in (result.stdout + result.stderr).splitlines() if line] if result.returncode else []
    )


def main() -> int:
    print("\n".join(table(ROOT)))
    found = [*check(ROOT), *badly_formatted(ROOT)]
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
