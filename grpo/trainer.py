"""A run from its first step to its last: stages, time, evaluation, checkpoints.

The steps themselves are in grpo/steps.py. A checkpoint needs no generator state, for every draw follows from
(seed, stage, step), and a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PickleError
from typing import Any

from duologue.grpo.ability.measure import at_end
from duologue.grpo.ability.prompts import read_prompts
from duologue.grpo.checkpoints import (
    checkpoints,
    damaged,
    read_state,
    spoiled,
    step_name,
    step_of,
    write_state,
)
from duologue.grpo.config import Config
from duologue.grpo.console import Progress
from duologue.grpo.crossplay import CrossPlay, Player
from duologue.grpo.evaluate import evaluate
from duologue.grpo.partners import START, in_full, policy_player, scripted_player, with_partners
from duologue.grpo.run_dir import Interrupted, RunDir
from duologue.grpo.saving import Saver
from duologue.grpo.space import check_space, checkpoint_bytes, weight_bytes
from duologue.grpo.steps import Metrics
from duologue.grpo.trackers import Trackers
from duologue.grpo.watched import Watched
from duologue.grpo.world import ALONE, World
from duologue.kernels import backend, libraries
from duologue.model.checkpoint import host_copy, is_checkpoint, on_host, parse_dtype, write_checkpoint
from torch import Tensor


class Trainer(Watched):
    """Holds what a run is made of; `run()` trains to the end and returns the summary."""

    def __init__(
        self, config: Config, run: RunDir, progress: Progress, stop: threading.Event, world: World = ALONE
    ) -> None:
        super().__init__(config, run, world)
        self.progress = progress
        self.stop = stop
        self.saver = Saver()
        self.trackers = Trackers(config, run.path, world.is_first)
        self.warm_start: dict[str, float] | None = None
        base = config.model.folder if config.model.path and config.eval.ability else None
        if base is not None and not is_checkpoint(base):
            raise ValueError(
                f"model.path = {config.model.path!r}: there is no checkpoint, which eval.ability = true "
                "needs at the end (false goes on without)"
            )
        if config.eval.ifeval:
            read_prompts(Path(config.eval.ifeval))  # refused now, not at the end
        checkpoint = run.latest_checkpoint()
        if checkpoint is not None:
            try:
                self._restore(checkpoint)
            except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, PickleError) as error:
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                reason = f"trainer_state.json or optimizer.pt: {what}"
                raise damaged(checkpoint, reason, seen_at_once=False) from error
        self._check_frozen()
        if world.is_first:
            self._check_space()
        run.go_on_from(self.step)

    def _check_frozen(self) -> None:
        """Of a resume: what a later step loads beside the checkpoint is whole, or is named now."""
        for folder, user in self._frozen() if self.warm_start is not None else ():
            if reason := spoiled(folder):
                way = "put a copy of it back, or start another run"
                raise ValueError(f"{folder}, which {user} needs, is damaged ({reason}): {way}")

    def _check_space(self) -> None:
        """The disk has room for all that the run is going to keep at once."""
        t, path = self.config.train, self.run_dir.path
        there = len(checkpoints(path))
        saves = 1 + (self.config.imitation.steps + t.steps - self.step) // t.save_every
        # A new one is whole before the oldest goes.
        more = max(min(t.keep_checkpoints + 1, there + saves) - there, 1)
        snapshots = self.opponents.kept(t.steps, t.keep_checkpoints * t.save_every)
        snapshots = max(snapshots - len([*self.opponents.folder.glob("step_*")]), 0)
        others = snapshots + (self.warm_start is None) + bool(self.config.eval.every)
        more += 2 * bool(self.config.watch.rollback)
        needed = more * checkpoint_bytes(self.model) + others * weight_bytes(self.model)
        check_space(path, needed, f"the run, which keeps {t.keep_checkpoints} checkpoints,")

    def _frozen(self) -> Iterator[tuple[Path, str]]:
        """Folders, and the setting on whose account each will be loaded."""
        start, c = self.run_dir.path / "checkpoints" / "warm_start", self.config
        left = range(self.selfplay_index, c.train.steps)
        if c.judge.backend == "policy":
            yield start, "judge.backend = 'policy'"
        if left and c.grpo.kl_coef:
            yield start, f"grpo.kl_coef = {c.grpo.kl_coef:g}"
        for path in self.opponents.needed(left) if left else ():
            yield path, f"opponent.kind = {c.opponent.kind!r}"
        if self.game.compared and c.eval.partners:
            yield start, f"eval.partners = {[*c.eval.partners]} ([] goes on without)"
        if left and c.eval.every and not self.game.alone:
            yield start, f"eval.every = {c.eval.every}"
        if left and c.watch.rollback:
            yield start, f"watch.rollback = {[*c.watch.rollback]} ([] goes on without)"
        if left and c.train.kl_every:
            yield start, f"train.kl_every = {c.train.kl_every} (0 goes on without)"

    def run(self) -> dict[str, Any]:
        imitation, selfplay = self.config.imitation.steps, self.config.train.steps
        self.trackers.begin()
        if self.step < imitation:
            self.progress.stage("imitation", imitation, self.step)
            while self.step < imitation:
                self._timed(self.imitation_step)
                self._save_if_due(imitation)
        if self.warm_start is None:
            self._end_of_imitation()
        if self.config.grpo.kl_coef or self.config.train.kl_every:
            self.reference = self.start_weights()
        for note in self.opponents.notes():
            self.progress.log(note)
        self.progress.stage("self-play", selfplay, self.step - imitation)
        self.keep_best()
        self.remember()
        while self.step < imitation + selfplay and not self._out_of_time() and not self.stopped:
            before = self.measure() if self.selfplay_index == 0 else None
            self._timed(self.selfplay_step, before)
            self._save_if_due(imitation + selfplay)
        return self._finish()

    # ---- stages, time, state -------------------------------------------------------------------------------

    def _timed(self, step: Callable[[], Metrics], before: Metrics | None = None) -> None:
        """One step, its time, and its lines in dialogues.jsonl and metrics.jsonl; `before` goes there too."""
        self.saver.check()
        began = time.monotonic()
        self.world.at_step(self.step)
        self.bad.new_step()
        metrics = step()
        seconds = time.monotonic() - began
        self.seconds += seconds
        metrics |= self.look() if metrics["stage"] == "selfplay" else {}
        sample = self._record()
        if self.bad.of_step:
            metrics["bad_updates"] = self.bad.of_step
        metrics["update_tokens_per_s"] = metrics.pop("tokens") / self.clock.pop("optimise", seconds)
        if "sampled_tokens" in metrics:
            played = self.world.each(self.clock.pop("play"))  # world
            metrics["rollout_tokens_per_s"] = metrics["sampled_tokens"] / max(played)
            if self.world.size > 1:
                metrics["idle_share"] = [1 - seconds / max(played) for seconds in played]
        self.step += 1
        metrics |= {"seconds": seconds, **{f"start_{key}": value for key, value in (before or {}).items()}}
        metrics |= self.measure() if metrics["stage"] == "selfplay" else {}
        said = self.note(metrics) if "watch" in metrics else []
        if self.world.is_first:  # world
            machine = {"peak_memory_bytes": _peak_memory(), "instruction_set": self._instruction_set()}
            row = {"step": self.step - 1, **metrics, **machine}
            self.run_dir.append_metrics(row)
            self.trackers.log(row, sample)
        in_stage = self.step if metrics["stage"] == "imitation" else self.selfplay_index
        self.progress.update(in_stage, metrics)
        for line in (*self.bad.lines, *said):
            self.progress.log(line)
        self.bad.check()
        if rollback := metrics.get("watch", {}).get("rollback"):
            self._go_back(rollback)

    def _go_back(self, rollback: Metrics) -> None:
        if self.best.step == self.step:
            self.keep_best()
        self.saver.wait()
        self.go_back(rollback)
        self._save()
        self.saver.wait()  # nothing is forgotten before the checkpoint that says so is there
        self.forget_since(rollback["to"])

    def _record(self) -> Metrics | None:
        """The dialogues of this step, in the order of the groups of all ranks, after them those that were
        dropped. The first is returned.
        """
        every = self.config.train.record_tokens
        by_token = bool(every) and self.selfplay_index % every == 0
        what: Any = {"by_token": by_token, "step": self.step, "stage": "selfplay"}
        records = [
            (
                [d.record(**what) for d in group.dialogues],
                [d.record(**what, dropped=True) for other in group.dropped for d in other.dialogues],
            )
            for group in self.played
        ]
        self.played = ()
        of_all = self.world.gather(records)  # world
        if self.world.is_first:
            kept, dropped = zip(*of_all, strict=True) if of_all else ((), ())
            self.run_dir.append_dialogues(record for part in (*kept, *dropped) for record in part)
        return of_all[0][0][0] if of_all else None

    def _out_of_time(self) -> bool:
        limit = self.config.train.max_seconds
        return self.world.agree(bool(limit) and self.seconds >= limit)  # world

    def _end_of_imitation(self) -> None:
        """Keep the policy as `warm_start`, measure it, and begin self-play with a fresh optimizer."""
        self.saver.wait()
        self.run_dir.save_checkpoint(
            "warm_start",
            lambda folder: write_checkpoint(self.model, self.tokenizer, folder),
            needed=weight_bytes(self.model),
        )
        if self.config.imitation.steps:
            self._save()  # before it is measured, which may fail
        self.warm_start = self._evaluate("warm_start")
        self.optimizer.reset()
        self._save()

    def _evaluate(self, policy: str) -> dict[str, float]:
        e, name = self.config.eval, policy.replace("_", " ")
        self.progress.log(f"evaluating {name} on {e.dialogues} {e.split} dialogues")
        metrics, dialogues = evaluate(
            self.opponents.engine, self.tokenizer, self.game, self.config, self.judge, self.world
        )
        if self.judge is not None:
            self.judge.costs()  # are those of steps
        by_token = self.config.train.record_tokens > 0
        self.run_dir.append_dialogues(
            d.record(by_token, step=self.step, stage="eval", policy=policy) for d in dialogues
        )
        return metrics

    def _finish(self) -> dict[str, Any]:
        self._save()
        self.saver.wait()  # what is measured may fail, or be killed: training is there
        self.run_dir.drop_trained(self.step)
        trained = self._evaluate("trained")
        summary: dict[str, Any] = {
            "warm_start": self.warm_start,
            "trained": trained,
            "train_seconds": self.seconds,
            "seed": self.config.train.seed,
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": self.config.model.device,
            "instruction_set": self._instruction_set(),
            "peak_memory_bytes": _peak_memory(),
        }
        if self.best.step >= 0:
            summary["best"] = self.best.summary()
        if self.stopped:
            self.progress.log(f"self-play ended after step {self.step}: {self.stopped}")
            summary["stopped"] = self.stopped
        if self.game.compared and self.config.eval.partners:
            summary["partners"] = self._with_partners()
        if self.config.model.path and self.config.eval.ability:
            self.progress.log(f"measuring what is kept of the language of {self.config.model.path}")
            engine = self.opponents.engine
            summary["ability"] = at_end(
                self.config, engine, self.tokenizer, self.game, self.judge, self.world, self.progress.log
            )
        self._save()  # which knows of the lines that were added
        self.saver.wait()
        self.run_dir.write_summary(summary)
        return summary

    def _with_partners(self) -> dict[str, Any]:
        """How the policy fares with each of `eval.partners`, and how its start does in its place."""
        c, game = self.config, self.game
        names = in_full(c.eval.partners, game)
        n = c.eval.partner_dialogues
        self.progress.log(f"evaluating trained with {', '.join(names)} on {n} {c.eval.split} contexts")
        trained = Player(name="trained", engine=self.opponents.engine, tokenizer=self.tokenizer)
        start = policy_player(START, self.reference or self.start_weights(), self.tokenizer, c)
        partners = [start if name == START else scripted_player(name, c, game) for name in names]
        return with_partners(CrossPlay(c, game, [trained, start], n), trained, start, partners)

    def _save_if_due(self, last: int) -> None:
        if self.world.agree(self.stop.is_set()):  # world
            self._save()
            self.saver.wait()
            raise Interrupted(f"stopped after step {self.step}; the state is saved")
        is_best = self.best.step == self.step
        if is_best or (self.step % self.config.train.save_every == 0 and self.step < last):
            self._save()  # before the best, which its state names
        if is_best:
            self.saver.wait()
            self.keep_best()
        self.keep_good(self._save)

    def _save(self, name: str = "") -> None:
        """Copy what the run goes on with, and begin to write it; under another name it is written now."""
        optimizer = self.optimizer.state_dict()  # world
        if name:
            self.saver.wait()
            size = checkpoint_bytes(self.model)
            self.run_dir.save_checkpoint(name, lambda to: self._write(to, optimizer), needed=size)
            return
        if not self.world.is_first:  # world
            return
        self.saver.wait()  # before there is a second copy
        model, lengths, name = on_host(self.model), self.run_dir.lengths(), step_name(self.step)
        optimizer = {key: host_copy(optimizer.pop(key)) for key in [*optimizer]}
        state = copy.deepcopy(self._state())

        def write(folder: Path) -> None:
            write_checkpoint(model, self.tokenizer, folder)
            write_state(folder, state, optimizer)

        self.saver.start(lambda: self._put(name, write, lengths))

    def _write(self, folder: Path, optimizer: dict[str, Tensor]) -> None:
        write_checkpoint(self.model, self.tokenizer, folder)
        write_state(folder, self._state(), optimizer)

    def _put(self, name: str, write: Callable[[Path], None], lengths: dict[str, int]) -> None:
        """In the saver's thread: a checkpoint more, and what only those needed that go for it."""
        keep, needed = self.config.train.keep_checkpoints, checkpoint_bytes(self.model)
        self.run_dir.put_checkpoint(name, write, lengths, keep, needed)
        oldest = checkpoints(self.run_dir.path)[0]  # which a user may go back to
        self.opponents.forget_before(max(step_of(oldest) - self.config.imitation.steps, 0))

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "warm_start": self.warm_start,
            "baseline": self.baseline.state_dict(),
            "opponents": self.opponents.state_dict(),
            "best": self.best.state_dict(),
            "instruction_set": self._instruction_set(),
        }
        if self.bad.in_a_row:
            state["bad_updates"] = self.bad.in_a_row
        if self.config.model.device.startswith("cuda"):
            state["gpu"] = libraries.describe_gpu()
        return state

    def _instruction_set(self) -> str:
        m = self.config.model
        return backend.instruction_set(m.device.partition(":")[0], parse_dtype(m.dtype))

    def _restore(self, folder: Path) -> None:
        state, optimizer = read_state(folder)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.bad.in_a_row = state.get("bad_updates", 0)
        self.warm_start = state["warm_start"]
        self.baseline.load_state_dict(state["baseline"])
        self.opponents.load_state_dict(state["opponents"])
        self.best.load_state_dict(state.get("best", {}))
        self.optimizer.load_state_dict(optimizer)


def _peak_memory() -> int:
    """Bytes of this process, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(
    config: Config, run: RunDir, progress: Progress, stop: threading.Event, world: World = ALONE
) -> dict[str, Any]:
    """Train to the end and return the summary; `Interrupted` after a save once `stop` is set."""
    trainer = Trainer(config, run, progress, stop, world)
    try:
        return trainer.run()
    except Exception:
        with contextlib.suppress(Exception):
            trainer.saver.wait()
        raise
    finally:
        trainer.trackers.close()
        if trainer.judge is not None:
            trainer.judge.close()
        trainer.arena.speakers.close()
