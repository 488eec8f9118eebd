"""The `duologue` command: train, config, eval, play, report, inspect, watch, data, export, doctor, plan.

Exit codes: 0 done, 1 failure, 2 bad usage or configuration, 130 interrupted (`train` has saved; --resume goes
on). An error is one line that names the thing, its value and what is accepted; DUOLOGUE_DEBUG=1 shows the
traceback too. Imports that need torch are inside the commands, so that help and bad usage answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duologue.grpo.commands import data, inspect_options

if TYPE_CHECKING:
    from duologue.grpo.config import Config
    from duologue.grpo.console import Progress
    from duologue.grpo.run_dir import RunDir
    from duologue.grpo.world import World

INTERRUPTED = 130
RECIPE = "a recipe's name (deal, collective-agency and so on) or the path of a .toml file"
CHECKPOINT = "a folder in Hugging Face layout"
PLAYER = "a checkpoint, a run, start (of that run), scripted:NAME, scripted (all), or a server's address"
DEVICE = "cpu, cuda or cuda:N (model.device)"
SETTINGS = "Settings: section.key=value or --section.key value, e.g. grpo.group_size=8 --train.seed 1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    try:
        rest, overrides = split_overrides(words)
        try:
            options = _parser().parse_args(rest)
        except SystemExit as stop:  # argparse has printed what is wrong
            return int(stop.code or 0)
        options.overrides, options.argv = overrides, words
        if overrides and not options.takes_settings:
            raise ValueError(f"{options.command} takes no settings, got {overrides[0]}")
        return int(options.run(options))
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        return _fail(error, 2)
    except (OSError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("DUOLOGUE_DEBUG"):
        traceback.print_exc()
    print(f"duologue: {error or type(error).__name__}", file=sys.stderr)
    return code


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the command line without the settings, and the settings as `section.key=value`, wherever
    they stand.
    """
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if re.fullmatch(r"--\w+(\.\w+)+", word):
            value = next(words, None)
            if value is None:
                raise ValueError(f"{word} lacks a value")
            overrides.append(f"{word[2:]}={value}")
        elif re.match(r"--\w+(\.\w+)+=|[\w.]+=", word):
            overrides.append(word.removeprefix("--"))
        else:
            rest.append(word)
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="duologue", description="Self-play trainer for negotiating policies"
    )
    version = f"duologue {importlib.metadata.version('duologue')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_measures(commands)
    _add_files(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, settings: bool = False
) -> Any:
    """Enter a command, and return what adds its arguments; `settings`: whether it takes them."""
    command = commands.add_parser(name, help=help, epilog=SETTINGS if settings else None)
    command.set_defaults(run=run, takes_settings=settings)
    return command.add_argument


def _add_runs(commands: Any) -> None:
    add = _command(commands, "train", _train, "train by a recipe or a TOML file", settings=True)
    add("recipe", help=RECIPE)
    add("--run-dir", type=Path, help="where the run is kept (default: runs/RECIPE-seedN-TIME)")
    resume = "go on with the run in --run-dir from its last checkpoint"
    add("--resume", action="store_true", help=resume)
    previous = "with --resume: put a damaged checkpoint aside and go on from the last whole one before it"
    add("--from-previous", action="store_true", help=previous)
    add("--device", help=DEVICE)
    start = "the checkpoint to start from (model.path): a folder, or its name in the Hugging Face Hub"
    add("--model", metavar="DIR|ORG/NAME", help=start)
    add("--ranks", type=int, default=1, metavar="N", help="processes here that train together (torchrun)")

    every = "print every setting with its meaning, as TOML to edit"
    add = _command(commands, "config", _config, every, settings=True)
    add("recipe", help=RECIPE)
    add("section", nargs="?", default="", help="one section alone, for example grpo")


def _add_measures(commands: Any) -> None:
    measured = "hold dialogues with a checkpoint, or between players, measured"
    add = _command(commands, "eval", _eval, measured, settings=True)
    add("players", nargs="+", metavar="PLAYER", help=f"{PLAYER}; of several, each meets each")
    add("--recipe", help="the recipe or TOML file that names the game; --ability can do without")
    add("--dialogues", type=int, help="how many (default: eval.dialogues)")
    add("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    against = f"whom the player meets in both seats: {PLAYER}; with dilemmas whose answers are compared"
    add("--against", metavar="PLAYER", help=against)
    add("--ability", action="store_true", help="measure what is kept of the language of its base")
    add("--ifeval", metavar="FILE", help="with --ability: prompts in IFEval's format, in place of ours")
    add("--json", type=Path, metavar="FILE", help="write the measures there")
    add("--save-dialogues", type=Path, metavar="FILE", help="write the dialogues there, one JSON line each")
    add("--device", help=DEVICE)

    add = _command(commands, "report", _later("report"), "write report.html of a run, finished or not")
    add("run_dir", type=Path)
    add("--inspect", action="store_true", help="with a link to inspect.html, which is written too")
    add = _command(commands, "watch", _later("watch"), "show a run that is under way, from its files")
    add("run_dir", type=Path)
    add("--once", action="store_true", help="print what there is and leave")
    add = _command(commands, "inspect", _later("inspector"), "write a page of a run's dialogues, by token")
    inspect_options.add_arguments(add)
    data.add_parser(commands).set_defaults(run=data.run, takes_settings=False)

    add = _command(
        commands, "play", _later("play"), "negotiate with a checkpoint in the terminal", settings=True
    )
    add("checkpoint", type=Path, help=f"{CHECKPOINT}, or a run directory for its last one")
    game = "the recipe or TOML file that names it (default: that of the checkpoint's run)"
    add("--game", metavar="RECIPE", help=game)
    add("--side", choices=("first", "second"), default="first", help="yours")
    add("--seed", type=int, default=0, help="of the scenario and of what the policy says")
    temperature = "of the policy's words, 0 for the likeliest (default: dialogue.temperature)"
    add("--temperature", type=float, help=temperature)


def _add_files(commands: Any) -> None:
    add = _command(commands, "export", _later("export"), "write a checkpoint of a run for other programs")
    add("source", type=Path, help="a checkpoint, or a run directory for its last one")
    add("out", type=Path, help="a new folder")
    add("--dtype", help="float32, bfloat16 or float16 (default: as it is)")
    add("--best", action="store_true", help="of a run the best checkpoint (eval.every), not the last")
    merge = "an adapter into its base, so that transformers loads it without peft"
    add("--merge", action="store_true", help=merge)
    add("--base", type=Path, metavar="DIR", help="where an adapter's base is now")

    examined = "show the device, the back ends in use and a self-check"
    add = _command(commands, "doctor", _doctor, examined)
    add("--ranks", type=int, metavar="N", help="check what a run of N ranks here would need")

    add = _command(
        commands, "plan", _later("plan"), "what a run would take of each rank's memory", settings=True
    )
    add("recipe", help=RECIPE)
    shape = "a checkpoint's folder, a config.json, or a well-known name such as Qwen3-8B"
    add("--model", required=True, metavar="DIR|SHAPE", help=shape)
    add("--ranks", type=int, default=1, metavar="N", help="processes, with a device each")
    add("--gpu-memory", type=float, default=141.0, metavar="GB", help="of a device, in 10^9 bytes")
    add("--cpu", action="store_true", help="by the kernels of the CPU, without graphs")
    add("--json", action="store_true", help="print one line of JSON, in bytes")


# ---- train -------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from duologue.grpo.microbatch import fitted
    from duologue.grpo.plan import check_memory

    shortcuts = {"model.path": options.model, "model.device": options.device}
    config = _resolved(options, shortcuts)
    if options.ranks < 1:
        raise ValueError(f"--ranks = {options.ranks}: accepted is 1 or more")
    started = "TORCHELASTIC_RUN_ID" in os.environ  # as a rank, which looks for itself
    on_gpus = options.ranks > 1 and config.model.device.startswith("cuda")  # to look would take memory there
    config = config if started or on_gpus else fitted(config, options.ranks)
    note = "" if started or on_gpus else check_memory(config, ranks=options.ranks)
    if not started and options.ranks == 1:
        return _train_run(options, config, _open_run(options, config), note)
    from duologue.grpo.distributed.launch import joined, launch, opened, use_cores

    if not started:
        return launch(options.ranks, options.argv, config.train.rank_timeout_s)
    here = use_cores(config)
    with joined(here) as world:
        here, config = (fitted(known, world.size, world) for known in (here, config))
        note = check_memory(here, ranks=world.size)
        run = opened(world, lambda kind: _open_run(options, config, kind))
        return _train_run(options, here, run, note, world)


def _train_run(
    options: argparse.Namespace, config: Config, run: RunDir | None, note: str, world: World | None = None
) -> int:
    from duologue.grpo.commands.report import check_lines, write_report
    from duologue.grpo.console import Progress
    from duologue.grpo.run_dir import Interrupted
    from duologue.grpo.trainer import train
    from duologue.grpo.world import ALONE
    from duologue.rollout.games.catalogue import kind_of

    world = world or ALONE
    progress = Progress(quiet=not world.is_first, measures=kind_of(config.game).measures)
    if run is None:
        if not world.is_first:
            return 0
        progress.log(f"{options.run_dir} is finished already; a longer run goes on with a larger train.steps")
        return _show_results(options.run_dir, config, progress)
    for line in (f"run directory: {run.path}", *run.notes, *filter(None, [note])):
        progress.log(line)
    try:
        if options.resume and world.is_first:
            check_lines(run.path)
        with _stop_on_signals(world.size > 1) as stop:
            train(config, run, progress, stop, world)
    except (ValueError, OSError, RuntimeError, MemoryError):
        run.forget_if_new()
        raise
    except Interrupted as pause:
        progress.close()
        progress.log(f"{pause}. Go on with the same command and --run-dir {run.path} --resume")
        return INTERRUPTED if world.size == 1 else 0
    finally:
        progress.close()
        run.close()
    if not world.is_first:
        return 0
    write_report(run.path)
    return _show_results(run.path, config, progress)


def _resolved(options: argparse.Namespace, shortcuts: dict[str, Any]) -> Config:
    """The configuration; `shortcuts` are settings that have an option of their own."""
    from duologue.grpo.policy import check_device
    from duologue.grpo.unsaid import resolved
    from duologue.model.hub import is_name

    chosen = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
    run = options.run_dir if getattr(options, "resume", False) else None
    players = (*getattr(options, "players", []), getattr(options, "against", None) or "")
    player = next((name for name in players if Path(name).is_dir() or is_name(name)), "")
    config = resolved(options.recipe, [*options.overrides, *chosen], run, player, options.device or "cpu")
    check_device(config)
    return config


def _open_run(options: argparse.Namespace, config: Config, kind: type[RunDir] | None = None) -> RunDir | None:
    """The run to work on; None when it is finished already."""
    from duologue.grpo.run_dir import RunDir, finished

    kind, path, toml = kind or RunDir, options.run_dir, config.to_toml()
    if options.from_previous and not options.resume:
        raise ValueError("--from-previous goes with --resume")
    if options.resume:
        if path is None:
            raise ValueError("--resume needs --run-dir DIR, the run to go on with")
        return None if finished(path, toml) else kind.resume(path, toml, options.from_previous)
    if path is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path("runs") / f"{Path(options.recipe).stem}-seed{config.train.seed}-{stamp}"
    return kind.create(path, toml)


def _show_results(path: Path, config: Config, progress: Progress) -> int:
    from duologue.grpo.commands.players import conditions, partners_table
    from duologue.rollout.games.catalogue import kind_of

    kind = kind_of(config.game)
    summary = json.loads((path / "summary.json").read_text("utf-8"))
    columns = {"warm start": summary["warm_start"], "trained": summary["trained"]}
    columns = {name: column for name, column in columns.items() if column}
    progress.measures = kind.measures_among(dict.fromkeys(key for c in columns.values() for key in c))
    progress.results(columns, conditions(config))
    if "partners" in summary:
        progress.console.print(partners_table(summary["partners"], kind.compared))
    if "ability" in summary:
        progress.log(summary["ability"]["line"])
    progress.log(f"trained for {summary['train_seconds']:.0f} s; report: {path / 'report.html'}")
    return 0


@contextlib.contextmanager
def _stop_on_signals(of_ranks: bool = False) -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks for a stop after the step at hand; the second does what it does by
    default, but to one of many ranks, which hears it from the terminal and from torchrun.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield stop
        return
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in usual}

    def listen(handlers: dict[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def ask_to_stop(*_: Any) -> None:
        stop.set()
        if of_ranks:
            return
        os.write(2, b"\nstopping after this step, then saving; once more to stop at once\n")
        # A shell starts a background job with SIGINT ignored.
        listen({n: usual[n] if handler is signal.SIG_IGN else handler for n, handler in before.items()})

    try:
        listen(dict.fromkeys(before, ask_to_stop))
        yield stop
    finally:
        listen(before)


# ---- config and eval ---------------------------------------------------------------------------------------


def _config(options: argparse.Namespace) -> int:
    from duologue.grpo.commands.config import described
    from duologue.grpo.config import load_config

    print(described(load_config(options.recipe, options.overrides), options.section), end="")
    return 0


def _eval(options: argparse.Namespace) -> int:
    shortcuts = {
        "model.device": options.device,
        "eval.ifeval": options.ifeval,
        "eval.dialogues": options.dialogues,
        "eval.temperature": 0.0 if options.greedy else None,
    }
    if options.ability:
        from duologue.grpo.commands import ability

        return ability.run(options, lambda: _resolved(options, shortcuts))
    if not options.recipe or options.ifeval:
        raise ValueError("eval without --ability: accepted is --recipe RECIPE, and no --ifeval FILE")
    server = next((name for name in (*options.players, options.against or "") if "://" in name), None)
    if server is not None:
        shortcuts |= {"opponent.kind": "endpoint", "opponent.url": server}
    config = _resolved(options, shortcuts)
    from duologue.grpo.commands.players import run

    return run(options, config)


# ---- the others --------------------------------------------------------------------------------------------


def _later(module: str) -> Callable[[argparse.Namespace], int]:
    """A command of grpo/commands that is imported when it is given."""

    def run(options: argparse.Namespace) -> int:
        return int(importlib.import_module(f"duologue.grpo.commands.{module}").run(options))

    return run


def _doctor(options: argparse.Namespace) -> int:
    if options.ranks is None:
        from duologue.grpo.commands.doctor import examine

        return examine()
    from duologue.grpo.commands.ranks import examine_ranks

    return examine_ranks(options.ranks)


if __name__ == "__main__":
    sys.exit(main())
