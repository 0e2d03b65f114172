"""The command line: `moss VERB …` or `python -m moss VERB …`.

A verb is one line in `VERBS`: its words, and the dataclass with its settings. The file that holds the dataclass is
imported only when its verb runs, so `moss --help` needs neither torch nor a parser; the one-line help of each verb is
the first line of its dataclass's docstring, read from the source.

Exit codes: 0 success, 1 an error in the input or the system (one line on standard error), 2 bad usage, 130 Ctrl-C,
141 the reader of the output has left, 143 SIGTERM; but a training that gets SIGTERM saves its step and ends with 0.
"""

from __future__ import annotations

import ast
import atexit
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from moss import __version__
from moss.errors import UsageError, one_line

VERBS = {
    "chat": "moss.terminal:Chat",
    "tool": "moss.tools.command:ToolCommand",
    "data curriculum": "moss.data.curriculum:Curriculum",
    "data convert": "moss.data.dialogs:Convert",
    "data tokens": "moss.data.mix:TokenShards",
    "data show": "moss.data.dialogs:Show",
    "data index": "moss.data.index:MakeIndex",
    "train tokenizer": "moss.train.tokenizer:TrainTokenizer",
    "train pretrain": "moss.train.pretrain:Pretrain",
    "train sft": "moss.train.sft:SFT",
    "train reward": "moss.train.reward:Reward",
    "train pat": "moss.train.pat:PAT",
    "train dpo": "moss.train.dpo:DPO",
    "train ppo": "moss.train.ppo:PPO",
    "eval mmlu": "moss.evals.choice:MMLU",
    "eval truthfulqa": "moss.evals.truthful:TruthfulQA",
    "eval perplexity": "moss.evals.perplexity:Perplexity",
    "eval toxicity": "moss.evals.toxicity:Toxicity",
    "eval judge": "moss.evals.judge:Judge",
    "eval gsm8k": "moss.evals.gsm8k:GSM8K",
    "eval all": "moss.evals.all:All",
    "eval compare": "moss.evals.compare:Compare",
    "eval tools": "moss.evals.tool_use:EvalTools",
    "doctor": "moss.evals.doctor:Doctor",
    "bench": "moss.evals.bench:Bench",
    "store backup": "moss.serve.store.backup:Backup",
    "store restore": "moss.serve.store.backup:Restore",
    "store migrate": "moss.serve.store.backup:Migrate",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never a traceback for what a user can mend.

    SIGTERM ends it as `sys.exit` would, so that half-written files go. To be called from the main thread.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "moss"
    before = signal.signal(signal.SIGTERM, _end)
    try:
        words, rest = split_verb(argv)
        if words not in VERBS:
            return _overview(words, rest)
        name = f"moss {words}"
        code = _run(words, rest)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `moss … | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        signal.signal(signal.SIGTERM, before)


def split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The longest verb that the arguments start with (or a group such as `data`, or ""), and what follows it."""
    for count in (2, 1):
        words = " ".join(argv[:count])
        if len(argv) >= count and (words in VERBS or any(verb.startswith(words + " ") for verb in VERBS)):
            return words, list(argv[count:])
    return "", list(argv)


def find(target: str) -> tuple[type, Callable[..., int]]:
    """Import "module:Class"; the function that runs it is the class's own file's `main`."""
    module_name, class_name = target.split(":")
    module = importlib.import_module(module_name)
    return getattr(module, class_name), module.main


def summary(target: str) -> str:
    """The first docstring line of "module:Class", without importing anything."""
    module_name, class_name = target.split(":")
    path = Path(__file__).parent.parent.joinpath(*module_name.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return (ast.get_docstring(node) or "").split("\n")[0]
    raise ValueError(f"{path} has no class {class_name}")


def _end(number: int, frame: object) -> NoReturn:
    """A signal as an exception, which runs every `finally` on its way."""
    raise SystemExit(128 + number)


def _run(words: str, rest: list[str]) -> int:
    from moss.config import parse  # jsonargparse costs 0.1 s that `moss --help` should not pay

    command, run = find(VERBS[words])
    return run(parse(command, rest, prog=f"moss {words}"))


def _overview(group: str, rest: list[str]) -> int:
    """The list of verbs, all or one group's; an unknown verb is bad usage."""
    name = " ".join(["moss", *group.split()])
    if rest and rest[0] == "--version" and not group:
        print(f"moss {__version__}")
        return 0
    if rest and rest[0] not in ("-h", "--help", "help"):
        known = sorted({verb.removeprefix(group).split()[0] for verb in VERBS if verb.startswith(group)})
        close = difflib.get_close_matches(rest[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(known)}"
        print(f"{name}: unknown command {rest[0]!r}; {hint}", file=sys.stderr)
        return 2
    shown = {verb: target for verb, target in VERBS.items() if verb.startswith(group)}
    width = max(map(len, shown)) + 2
    out = sys.stdout if rest else sys.stderr
    print(f"usage: {name} COMMAND [options]\n", file=out)
    for verb, target in shown.items():
        print(f"  {verb:<{width}}{summary(target)}", file=out)
    print(f"\n{name} COMMAND --help tells all about one command.", file=out)
    return 0 if rest else 2


def _leave(code: int) -> NoReturn:
    """End the process. One of several ranks ends without Python's own end: a thread of gloo that lets its last tensor
    go meanwhile asks for an interpreter that is no more, and aborts a run that was done."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
