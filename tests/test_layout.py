"""The tree obeys its own rules: layers, folders, no circles, names that cannot clash, the yardstick."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("count_lines", ROOT / "bench" / "count_lines.py")
assert _spec is not None
assert _spec.loader is not None
count_lines = importlib.util.module_from_spec(_spec)
sys.modules["count_lines"] = count_lines
_spec.loader.exec_module(count_lines)

LAYERS = ("kernels", "model", "rollout", "grpo")  # each imports itself and those before it
FOLDERS = {  # inside a layer: a folder imports itself, the layer's own files and the folders named here
    "rollout/engine": set(),
    "rollout/games": set(),
    "rollout/judge": {"rollout/engine", "rollout/games"},
    "rollout/selfplay": {"rollout/engine", "rollout/games", "rollout/judge"},
}
SHELF = {  # folder: the files outside it that may import it
    "grpo/commands": {"grpo/cli.py"},
    "grpo/distributed": {"grpo/cli.py", "grpo/build.py"},
}
NOT_FOR_PRODUCT = {"bench", "tests", "conftest", "pytest", "transformers", "trl", "psutil", "hypothesis"}
NO_TORCH = {"rollout/engine/scheduler.py", "rollout/engine/pages.py", "rollout/engine/sequence.py"}


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


def targets(tree: ast.Module, root: Path) -> Iterator[str]:
    """The product's files that a file imports, in whatever block: for annotations alone too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            file = module.removeprefix("duologue.").replace(".", "/") + ".py"
            if module.startswith("duologue.") and (root / file).is_file():
                yield file


def import_map(root: Path) -> dict[str, set[str]]:
    return {str(f.relative_to(root)): set(targets(parse(f), root)) for f in product_files(root)}


def circles(root: Path) -> list[str]:
    """Files that import each other, directly or through others: each circle once, as its path."""
    graph, found, done = import_map(root), [], set()

    def walk(file: str, path: list[str]) -> None:
        if file in path:
            found.append(" -> ".join([*path[path.index(file) :], file]))
        elif file not in done:
            for target in sorted(graph.get(file, ())):
                walk(target, [*path, file])
            done.add(file)

    for file in sorted(graph):
        walk(file, [])
    return found


def within(file: str, folder: str) -> bool:
    return file.startswith(folder + "/")


def folders_out_of_order(root: Path) -> list[str]:
    """Imports that go up between folders of a layer, and imports of a shelf by others."""
    found = []
    for file, imported in import_map(root).items():
        for target in sorted(imported):
            here = next((f for f in FOLDERS if within(file, f)), None)
            there = next((f for f in FOLDERS if within(target, f)), None)
            if there and here != there and file.startswith("rollout/") and there not in FOLDERS.get(here, ()):
                found.append(f"{file} imports {target}")
            for shelf, allowed in SHELF.items():
                if within(target, shelf) and not within(file, shelf) and file not in allowed:
                    found.append(f"{file} imports {target}")
    return found


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
    """A root folder with __init__.py shadows other distributions; a module may shadow the standard's."""
    found = [str(p.relative_to(root)) for layer in LAYERS for p in (root / layer).rglob("__init__.py")]
    found += [str(p.relative_to(root)) for p in product_files(root) if p.stem in sys.stdlib_module_names]
    return found + [name for name in ("duologue",) if (root / name).exists()]


def over_yardstick(root: Path) -> list[str]:
    found: list[str] = count_lines.check(root)
    return found


@pytest.mark.parametrize(
    "check", [wrong_imports, folders_out_of_order, circles, clashing_names, over_yardstick]
)
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
        (folders_out_of_order, "rollout/selfplay/a.py", "import duologue.rollout.judge.b\n", 0),
        (folders_out_of_order, "rollout/judge/a.py", "from duologue.rollout.selfplay import b\n", 1),
        (
            folders_out_of_order,
            "rollout/games/a.py",
            "def f():\n    from duologue.rollout.engine.b import c\n",
            1,
        ),
        (folders_out_of_order, "grpo/trainer.py", "from duologue.grpo.commands.b import c\n", 1),
        (folders_out_of_order, "grpo/cli.py", "from duologue.grpo.commands.b import c\n", 0),
        (circles, "grpo/a.py", "from duologue.grpo.b import c\n", 0),
        (circles, "rollout/judge/b.py", "from duologue.rollout.judge import c\n", 1),
        (circles, "grpo/a.py", "if TYPE_CHECKING:\n    from duologue.grpo.a import c\n", 1),
        (over_yardstick, "model/a.py", long_function(50), 0),
        (over_yardstick, "model/a.py", long_function(51), 1),
        (
            over_yardstick,
            "model/a.py",
            "class A:\n    async " + long_function(51).replace("    x", "        x"),
            1,
        ),
        (over_yardstick, "kernels/a.py", long_function(90), 0),
        (over_yardstick, "kernels/a.py", long_function(91), 1),
        (over_yardstick, "grpo/a.py", "x = 1\n" * 400, 0),
        (over_yardstick, "grpo/a.py", "x = 1\n" * 401, 1),
        (over_yardstick, "grpo/a.py", "# " + "x" * 108 + "\n", 0),
        (over_yardstick, "grpo/a.py", "# " + "x" * 109 + "\n", 1),
        (over_yardstick, "grpo/a.py", "x = [" + "1, " * 30 + "]\n", 1),
        (over_yardstick, "grpo/a.py", "x = 1\ny = f(a)  # fmt: skip\n", 1),
        (over_yardstick, "grpo/a.py", "x = 1\ny = [\n  (1, 2),\n  (3, 4),\n]  # fmt: skip\n", 0),
    ],
)
def test_the_checks_see_what_they_should(
    check: Callable[[Path], list[str]], name: str, text: str, n_found: int, tmp_path: Path
) -> None:
    for other in ("rollout/selfplay/b.py", "rollout/judge/b.py", "rollout/engine/b.py", "grpo/commands/b.py"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("x = 1\n")
    (tmp_path / "rollout/judge/c.py").write_text("from duologue.rollout.judge.b import x\n")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert len(check(tmp_path)) == n_found


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_a_compiler_that_cannot_build_the_kernels_is_told_and_nothing_else(tmp_path: Path) -> None:
    """As GCC before 12: the install goes on without them."""
    lacking = "-DCMAKE_CXX_FLAGS=-D__builtin_shufflevector=absent"
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), lacking]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "no C++ compiler that knows __builtin_shufflevector (GCC 12 or newer, clang)" in said
