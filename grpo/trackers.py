"""A run's numbers where people already look: TensorBoard's event files, Weights & Biases.

Both packages are optional. What they get is what metrics.jsonl has, and a dialogue now and then; nothing of a
run depends on them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duologue.grpo.config import Config
from duologue.model.atomic import write_file
from duologue.rollout.games.catalogue import kind_of

SAMPLE_EVERY = 10  # steps of self-play from one dialogue to the next
Row = Mapping[str, Any]


def numbers(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of all numbers in a line of metrics.jsonl; what is within another is named a/b."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from numbers(value, f"{name}/")
        elif isinstance(value, list | tuple):
            yield from numbers({str(at): item for at, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            yield name, float(value)


class Trackers:
    """`begin`, `log` each line as it is written, then `close`. ValueError where a package is missing."""

    def __init__(self, config: Config, run: Path, first: bool = True) -> None:
        """`first`: whether this rank writes the run's files."""
        self.config, self.run = config, run
        self._writer: Any = None  # is made at the first line
        self._wandb: Any = None
        wanted = {"tensorboard": config.train.tensorboard, "wandb": bool(config.train.wandb)}
        self.wanted = {name for name, is_wanted in wanted.items() if is_wanted and first}
        for name in sorted(self.wanted):
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"train.{name}: accepted with the package {name}, which is not installed here: "
                    f"pip install 'duologue[{name}]'"
                )

    def log(self, row: Row, dialogue: Row | None = None) -> None:
        """A line, and a dialogue of its step as it is recorded."""
        if not self.wanted:
            return
        step, stage = row["step"], row["stage"]
        values = {f"{stage}/{name}": value for name, value in numbers(row) if name != "step"}
        sample = "" if dialogue is None or step % SAMPLE_EVERY else self._in_words(dialogue)
        if "tensorboard" in self.wanted:
            self._to_events(step, values, sample)
        if "wandb" in self.wanted:
            self._to_wandb(step, values, sample)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _to_events(self, step: int, values: Mapping[str, float], sample: str) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a process that was killed wrote of later steps is not shown.
            self._writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if sample:
            self._writer.add_text("dialogue", sample, step)
        self._writer.flush()

    def begin(self) -> None:
        """ValueError where Weights & Biases cannot be reached, before anything is computed."""
        if "wandb" not in self.wanted:
            return
        import wandb

        folder, project = self.run.resolve(), self.config.train.wandb
        try:
            self._wandb = wandb.init(
                project=project,
                name=folder.name,
                id=_wandb_id(folder),
                resume="allow",
                dir=str(folder),
                config=tomllib.loads(self.config.to_toml()),
            )
        except Exception as error:  # wandb's own are no kinds of any that Python has
            said = " ".join(str(error).split())[:300]
            ways = "`wandb login`, WANDB_MODE=offline, or train.wandb= (empty)"
            raise ValueError(f"train.wandb = {project!r}: {said}; accepted after {ways}") from error

    def _to_wandb(self, step: int, values: Mapping[str, float], sample: str) -> None:
        import wandb

        more = {"dialogue": wandb.Html(f"<pre>{_escaped(sample)}</pre>")} if sample else {}
        self._wandb.log({**values, **more}, step=step)

    def _in_words(self, record: Row) -> str:
        """Markdown, as far as a dialogue's own text is none."""
        shown = kind_of(self.config.game).shown(record)
        sides = shown["sides"]
        told = [f"{sides[side]} was told: {text}" for side, text in enumerate(shown["told"])]
        said = [f"{sides[turn['role']]}: {turn['text']}" for turn in record["turns"]]
        return "\n\n".join([*told, *said, shown["verdict"]])


def _wandb_id(run: Path) -> str:
    """The run's name there: it lies with the run, so that it is the same at a resume, wherever that is."""
    note = run / "wandb.id"
    if not note.is_file():
        begun = (run / "wandb").is_dir()  # by an older version, which named it by its place
        name = hashlib.sha256(str(run).encode()).hexdigest() if begun else uuid.uuid4().hex
        write_file(note, name[:16].encode())
    return note.read_text("ascii")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
