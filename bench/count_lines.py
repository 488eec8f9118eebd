"""Lines of the product's Python against its budget: 12,500 in all, 400 a file, 50 a function (90 in kernels)."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "model", "rollout", "grpo")
TOTAL, FILE, FUNCTION, KERNEL = 12500, 400, 50, 90


def main() -> int:
    over, total = [], 0
    for layer in LAYERS:
        sizes = {path: path.read_text().splitlines() for path in sorted((ROOT / layer).rglob("*.py"))}
        lines = sum(map(len, sizes.values()))
        total += lines
        print(f"{layer:8} {len(sizes):3} files {lines:6,} lines")
        over += [
            f"{path.relative_to(ROOT)}: {len(text)} lines, at most {FILE}"
            for path, text in sizes.items()
            if len(text) > FILE
        ]
        limit = KERNEL if layer == "kernels" else FUNCTION
        for path, text in sizes.items():
            for node in ast.walk(ast.parse("\n".join(text))):
                if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > limit:
                    over.append(f"{path.relative_to(ROOT)}: {node.name} has {n} lines, at most {limit}")
    print(f"{'total':8} {total:16,} lines of {TOTAL:,}")
    over += [f"{total} lines in all, at most {TOTAL}"] if total > TOTAL else []
    print("\n".join(over))
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
