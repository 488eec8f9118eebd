"""The tree obeys its own rules: the order of layers, names that cannot clash, budgets of lines (design.md 1, 5, 9)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "model", "rollout", "grpo")  # each imports itself and those before it
NOT_FOR_PRODUCT = {"bench", "tests", "conftest", "pytest", "transformers", "trl", "psutil", "hypothesis"}
NO_TORCH = {"rollout/engine/scheduler.py", "rollout/engine/pages.py", "rollout/engine/sequence.py"}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, PRODUCT_LINES = 400, 50, 90, 12_500


def product_files(root: Path) -> Iterator[Path]:
    for layer in LAYERS:
        yield from sorted((root / layer).rglob("*.py"))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in a file; a relative import begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield prefix
            if prefix in ("duologue", "."):
                yield from (f"{prefix}.{alias.name}" for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    found = []
    for file in product_files(root):
        name = str(file.relative_to(root))
        allowed = LAYERS[: LAYERS.index(name.split("/")[0]) + 1]
        for module in imports(parse(file)):
            first, _, rest = module.partition(".")
            upward = first == "duologue" and rest and rest.split(".")[0] not in allowed
            bare = (
                first in LAYERS or first == ""
            )  # `import kernels`, `from . import x`: the package is duologue
            if upward or bare or first in NOT_FOR_PRODUCT or (first == "torch" and name in NO_TORCH):
                found.append(f"{name} imports {module}")
    return found


def clashing_names(root: Path) -> list[str]:
    """A root folder with __init__.py shadows other distributions; a module may shadow the standard library's."""
    found = [str(p.relative_to(root)) for layer in LAYERS for p in (root / layer).rglob("__init__.py")]
    found += [str(p.relative_to(root)) for p in product_files(root) if p.stem in sys.stdlib_module_names]
    return found + [name for name in ("duologue",) if (root / name).exists()]


def over_budget(root: Path) -> list[str]:
    found, total = [], 0
    for file in product_files(root):
        name, lines = str(file.relative_to(root)), len(file.read_text("utf-8").splitlines())
        total += lines
        if lines > FILE_LINES:
            found.append(f"{name} has {lines} lines")
        limit = KERNEL_LINES if name.startswith("kernels/") else FUNCTION_LINES
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > limit:
                    found.append(f"{name}: {node.name} has {length} lines")
    if total > PRODUCT_LINES:
        found.append(f"the product has {total} lines")
    return found


@pytest.mark.parametrize("check", [wrong_imports, clashing_names, over_budget])
def test_the_tree_obeys(check: Callable[[Path], list[str]]) -> None:
    assert len(list(product_files(ROOT))) > 20
    assert check(ROOT) == []


def long_function(n: int) -> str:
    return "def long():\n" + "    x = 1\n" * (n - 1)


@pytest.mark.parametrize(
    ("check", "name", "text", "n_found"),
    [
        (
            wrong_imports,
            "model/a.py",
            "from duologue.kernels import ops\nfrom duologue.model.b import c\n",
            0,
        ),
        (wrong_imports, "model/a.py", "import duologue\nimport torch, json\n", 0),
        (wrong_imports, "kernels/a.py", "from duologue.model import decoder\n", 1),
        (wrong_imports, "rollout/engine/a.py", "def f():\n    import duologue.grpo.loss as loss\n", 1),
        (wrong_imports, "rollout/a.py", "from duologue import grpo, model\n", 1),
        (wrong_imports, "grpo/a.py", "from bench import common\n", 1),
        (wrong_imports, "grpo/a.py", "import transformers.models\nimport tests\n", 2),
        (wrong_imports, "model/a.py", "from . import b\nfrom .c import d\nfrom kernels import ops\n", 4),
        (wrong_imports, "rollout/engine/scheduler.py", "import torch.nn\n", 1),
        (clashing_names, "kernels/ops.py", "", 0),
        (clashing_names, "kernels/__init__.py", "", 1),
        (clashing_names, "rollout/engine/__init__.py", "", 1),
        (clashing_names, "grpo/types.py", "", 1),
        (clashing_names, "duologue/a.py", "", 1),
        (over_budget, "model/a.py", long_function(50), 0),
        (over_budget, "model/a.py", long_function(51), 1),
        (
            over_budget,
            "model/a.py",
            "class A:\n    async " + long_function(51).replace("    x", "        x"),
            1,
        ),
        (over_budget, "kernels/a.py", long_function(90), 0),
        (over_budget, "kernels/a.py", long_function(91), 1),
        (over_budget, "grpo/a.py", "x = 1\n" * 400, 0),
        (over_budget, "grpo/a.py", "x = 1\n" * 401, 1),
        (over_budget, "grpo/a.py", "x = 1\n" * (PRODUCT_LINES + 1), 2),
    ],
)
def test_the_checks_see_what_they_should(
    check: Callable[[Path], list[str]], name: str, text: str, n_found: int, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text)
    assert len(check(tmp_path)) == n_found
