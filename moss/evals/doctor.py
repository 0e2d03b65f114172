"""`moss doctor`: what this machine can run, and the line that mends each gap.

    moss doctor
    moss doctor --json

Looked at are Python and PyTorch, the processor, GPUs, memory and disk, the kernels of the engine, the bundled model,
the layers around tools, what optional parts need, and the terminal. Nothing is changed, and no network is asked. The
exit code is 1 where the bundled model cannot run, else 0: a gap is no error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moss.engine.kernels import library
from moss.evals.base import WIDTH
from moss.resolve import BYTES, FILL, free_memory, load
from moss.tools import calculator
from moss.tools.base import ToolError, standard_tools

SIZES = (0.6, 1.7, 4, 8, 14, 16, 32, 70)  # billions of parameters, as models come
EXTRAS = {
    "pictures of training (--report)": ("matplotlib", "train"),
    "toxicity by a classifier": ("transformers", "eval"),
    "search": ("tantivy", "search"),
    "reading of web pages": ("trafilatura", "search"),
    "MCP": ("mcp", "mcp"),
}


@dataclass(frozen=True)
class Doctor:
    """Say what this machine can run, and the line that mends each gap."""

    json: bool = False  # print the findings as one JSON list


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is fine, what was found, and what mends it ("": nothing needs to)."""

    name: str
    fine: bool
    found: str
    mend: str = ""
    needed: bool = False  # without it nothing runs


def main(config: Doctor) -> int:
    """Run the command."""
    findings = [finding for check in CHECKS for finding in safe(check)]
    if config.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    else:
        show(findings)
    return int(any(finding.needed and not finding.fine for finding in findings))


def safe(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds; where it fails itself, that is what it found."""
    try:
        return list(check())
    except (OSError, ValueError, RuntimeError) as error:
        return [Finding(check.__name__, False, f"{type(error).__name__}: {error}")]


def show(findings: list[Finding]) -> None:
    """A table, and below it what mends the gaps."""
    screen = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    table = Table(title="moss doctor", title_justify="left", header_style="bold")
    for column in ("", "", "found"):
        table.add_column(column)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.fine else "[red]gap[/]", finding.name, finding.found)
    screen.print(table)
    for finding in findings:
        if finding.mend:
            screen.print(f"{finding.name}: {finding.mend}")


# ---------------------------------------------------------------- checks


def python() -> Iterator[Finding]:
    """The interpreter and PyTorch."""
    fine = sys.version_info >= (3, 11)
    yield Finding("Python", fine, platform.python_version(), "" if fine else "install Python 3.11 or newer", True)
    yield Finding("PyTorch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def processor() -> Iterator[Finding]:
    """What the processor can compute."""
    level = torch.backends.cpu.get_cpu_capability()
    about = {"AVX512": "all widths are fast", "AVX2": "int8 and int4 are fast, prompts in bfloat16 slow"}
    known = about.get(level, "int8 and int4 are slower than bfloat16 here")
    yield Finding("processor", level in about, f"{platform.machine()}, {os.cpu_count()} cores, {level}: {known}")
    kernels = library()
    mend = "" if kernels else "install a C++ compiler (Debian, Ubuntu: sudo apt install g++), then start again"
    yield Finding("engine's kernels", kernels is not None, "built" if kernels else "none: answers are slower", mend)
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    mend = "" if compiler else "install a C++ compiler (Debian, Ubuntu: sudo apt install g++)"
    yield Finding("compiled training", compiler is not None, compiler or "no C++ compiler: half as fast", mend)


def graphics() -> Iterator[Finding]:
    """GPUs that PyTorch can use."""
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0]
        yield Finding(
            f"GPU {number}", True, f"{about.name}, {free / 1e9:.0f} of {about.total_memory / 1e9:.0f} GB free"
        )
    if not torch.cuda.is_available():
        card = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
        again = "rm -rf .venv && make chat TORCH_INDEX=https://download.pytorch.org/whl/cu130"
        mend = again if card else ""
        yield Finding(
            "GPU", not card, "one that this PyTorch cannot use" if card else "none; all runs on the CPU", mend
        )


def memory() -> Iterator[Finding]:
    """What fits."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    free = free_memory(place)
    largest = {}
    for dtype, each in BYTES.items():
        fits = [size for size in SIZES if size * 1e9 * each <= FILL * free]
        largest[dtype] = f"{fits[-1]:g}B as {dtype}" if fits else ""
    told = ", ".join(filter(None, largest.values())) or "only models of less than 0.6B"
    yield Finding("memory", True, f"{free / 1e9:.1f} GB free on the {place}: {told}")
    disk = shutil.disk_usage(Path.cwd()).free
    mend = "" if disk > 5e9 else "free some space: a run keeps two checkpoints of twelve bytes a parameter each"
    yield Finding("disk", disk > 5e9, f"{disk / 1e9:.0f} GB free here", mend)


def model() -> Iterator[Finding]:
    """The bundled model."""
    try:
        decoder, tok = load()
    except ValueError as error:
        yield Finding("bundled model", False, str(error), "copy the project again, or make one with `make nano`", True)
        return
    size = sum(parameter.numel() for parameter in decoder.parameters())
    yield Finding("bundled model", True, f"{size / 1e6:.1f}M parameters, {tok.vocab_size} ids", needed=True)


def tools() -> Iterator[Finding]:
    """The tools, and the walls around them."""
    try:
        layers = calculator.BOX.layers
    except (ToolError, OSError, ValueError, RuntimeError) as error:
        yield Finding("tools", False, f"they cannot be shut in: {error}", "MOSS_SANDBOX=process runs them with less")
        return
    held = ", ".join(
        f"{name} {value}" if not isinstance(value, bool) else name for name, value in layers.items() if value
    )
    missing = [name for name, value in layers.items() if not value]
    if layers["mode"] != "strict":
        missing.append("the kernel's walls")
    told = f"{', '.join(standard_tools())}; {held}" + (f"; without {', '.join(missing)}" if missing else "")
    yield Finding("tools", True, told)


def extras() -> Iterator[Finding]:
    """What optional parts need."""
    for name, (package, extra) in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        mend = "" if there else f".venv/bin/pip install -e '.[{extra}]'"
        yield Finding(name, there, package if there else f"{package} is not installed", mend)


def terminal() -> Iterator[Finding]:
    """Whether Chinese can be shown."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    mend = "" if encoding == "utf8" else "export PYTHONUTF8=1"
    yield Finding("terminal", encoding == "utf8", encoding or "unknown", mend)


CHECKS = (python, processor, graphics, memory, model, tools, extras, terminal)
