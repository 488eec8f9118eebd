"""Makes `duologue` importable from a bare checkout, here and in child processes: its name exists only in an
installation. Not for what the C++ kernels are needed for, which nobody has built there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "model", "rollout", "grpo")


def is_installed() -> bool:
    """Asked of a module, for an editable installation leaves a folder of that name with the C++ library."""
    try:
        return importlib.util.find_spec("duologue.grpo.cli") is not None
    except ModuleNotFoundError:
        return False


def find_package() -> None:
    """Puts a folder on the path with links to the layers, and the metadata that the command line reads its
    version from. Does nothing where duologue is installed.
    """
    if is_installed():
        return
    folder = Path(tempfile.mkdtemp(prefix="duologue-bare-"))
    package, metadata = folder / "duologue", folder / "duologue-0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").touch()  # else a folder that has one would win
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: duologue\nVersion: 0\n", "utf-8")
    for layer in LAYERS:
        (package / layer).symlink_to(ROOT / layer)
    sys.path[:0] = [str(folder), str(ROOT)]
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.modules.pop("duologue", None)
    importlib.invalidate_caches()
