"""The `duologue` command: train, eval, report, doctor.

Exit codes: 0 done, 1 failure, 2 bad usage or configuration, 130 interrupted (the state is saved; --resume goes on). Errors are one
line that names the thing, its value and what is accepted; DUOLOGUE_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duologue.grpo.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options, extra = parser.parse_known_args(arguments)
        options.overrides = [*getattr(options, "overrides", []), *_dashed(parser, extra)]
    except SystemExit as stop:  # argparse has printed what is wrong
        return int(stop.code or 0)
    try:
        return int(_COMMANDS[options.command](options))
    except ValueError as error:
        return _fail(error, 2)
    except (OSError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)


def _fail(error: Exception, code: int) -> int:
    print(f"duologue: {error}", file=sys.stderr)
    if os.environ.get("DUOLOGUE_DEBUG"):
        raise error
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="duologue", description="Self-play trainer for negotiating language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train by a recipe or a TOML file")
    train.add_argument("recipe", help="a recipe's name (deal) or the path of a .toml file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. grpo.group_size=8 train.seed=1")
    train.add_argument("--run-dir", type=Path, help="where the run is kept (default: runs/RECIPE-seedN-TIME)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --run-dir from its newest checkpoint")
    train.add_argument("--model", dest="model_path", metavar="DIR", help="the checkpoint to start from (model.path)")
    evaluate = commands.add_parser("eval", help="hold dialogues with a checkpoint and measure them")
    evaluate.add_argument("checkpoint", type=Path, help="a folder in Hugging Face layout")
    evaluate.add_argument("--recipe", required=True, help="the recipe or TOML file that names the game")
    evaluate.add_argument("--dialogues", type=int, help="how many (default: eval.dialogues)")
    evaluate.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the measures there")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    report = commands.add_parser("report", help="make report.html of a run")
    report.add_argument("run_dir", type=Path)
    commands.add_parser("doctor", help="show the device, the back ends in use and a self-check")
    return parser


def _dashed(parser: argparse.ArgumentParser, extra: list[str]) -> list[str]:
    """`--section.key value` and `--section.key=value` as overrides; anything else is bad usage."""
    found = []
    rest = list(extra)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word.split("=")[0]:
            parser.error(f"unrecognized argument {word}")
        found.append(word[2:] if "=" in word else f"{word[2:]}={rest.pop(0) if rest else parser.error(f'{word} lacks a value')}")
    return found


# ---- commands --------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from duologue.grpo.config import load_config

    overrides = list(options.overrides)
    if options.model_path:
        overrides.append(f"model.path={options.model_path}")
    config = load_config(options.recipe, overrides)
    from duologue.grpo.progress import Progress
    from duologue.grpo.report import write_report
    from duologue.grpo.run import Interrupted
    from duologue.grpo.trainer import train

    run = _run_dir(options, config)
    if run is None:
        print(f"{options.run_dir} is finished; its results are in {options.run_dir / 'summary.json'} and report.html")
        return 0
    progress = Progress()
    progress.log(f"run directory: {run.path}")
    with _stop_on_signals(progress) as stop:
        try:
            summary = train(config, run, progress, stop)
        except Interrupted as pause:
            progress.close()
            progress.log(f"{pause}; go on with: duologue train {options.recipe} ... --run-dir {run.path} --resume")
            return 130
        finally:
            progress.close()
    report = write_report(run.path)
    progress.results({"warm start": summary["warm_start"], "trained": summary["trained"]})
    progress.log(f"{summary['train_seconds']:.0f} s of training; report: {report}")
    return 0


def _run_dir(options: argparse.Namespace, config: Config) -> Any:
    """The run to work on; None when it is finished already."""
    from duologue.grpo.run import RunDir

    if not options.resume:
        path = options.run_dir
        if path is None:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            path = Path("runs") / f"{Path(options.recipe).stem}-seed{config.train.seed}-{stamp}"
        return RunDir.create(path, config.to_toml())
    if options.run_dir is None:
        raise ValueError("--resume needs --run-dir DIR, the run to go on with")
    if (options.run_dir / "summary.json").is_file():
        return None
    return RunDir.resume(options.run_dir, config.to_toml())


@contextlib.contextmanager
def _stop_on_signals(progress: Any) -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks for a stop after the step at hand; the second is the default one."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        progress.log("stopping after this step; once more to stop at once")
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        for number in before:
            signal.signal(number, ask)
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _eval(options: argparse.Namespace) -> int:
    from duologue.grpo.config import load_config
    from duologue.model.files import write_file

    overrides = [*options.overrides]
    if options.dialogues is not None:
        overrides.append(f"eval.dialogues={options.dialogues}")
    if options.greedy:
        overrides.append("eval.temperature=0.0")
    config = load_config(options.recipe, overrides)
    from duologue.grpo.evaluate import evaluate
    from duologue.grpo.progress import Progress
    from duologue.grpo.setup import build_game, load_policy, use_threads

    use_threads(config)
    model, tokenizer = load_policy(options.checkpoint, config)
    metrics, _ = evaluate(model, tokenizer, build_game(config), config)
    Progress().results({str(options.checkpoint.name): metrics})
    if options.json:
        write_file(options.json, json.dumps(metrics, indent=2).encode())
    return 0


def _report(options: argparse.Namespace) -> int:
    from duologue.grpo.report import write_report

    print(write_report(options.run_dir))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from duologue.grpo.doctor import examine

    return examine()


_COMMANDS = {"train": _train, "eval": _eval, "report": _report, "doctor": _doctor}

if __name__ == "__main__":
    sys.exit(main())
