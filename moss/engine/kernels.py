"""The CPU kernels of `kernels.cpp`: built once by the system's compiler, loaded by ctypes, shared by all who need them.

What    `library()` gives the kernels for this CPU, or None where they cannot be had; then one line says why, and
        PyTorch's own operations do the work. `Library.linear` is y = W x for up to MAX_TOKENS tokens.
Why     One source with a C interface builds in seconds and has no tie to a version of torch. The threads are those of
        the OpenMP runtime that torch brought into the process: the kernels are linked to none of their own.
How     y = library().linear(describe(weight), x)

A build is named by the hash of source, compiler and flags and moved to its place whole, so that neither a second
process nor another machine with the same home folder can meet a half-written or unfit one. A build that failed leaves
the reason under its name, so that the next process does not wait for it to fail again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from moss.files import replacing
from moss.log import note

MAX_TOKENS = 16  # tokens of one call; more are a matter of arithmetic, not of memory
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3
GROUP = 128  # columns that share a scale
SLACK = 16  # groups behind the last scale that a vector load may touch

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = "-std=c++20 -O2 -fPIC -fopenmp -fno-exceptions -fno-math-errno -fno-trapping-math -ffp-contract=off".split()
# What a path needs from the CPU, as /proc/cpuinfo names it; the best comes first.
PATHS = {
    "avx512": ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
BUILD_SECONDS = 600  # a build takes a few; on a machine under full load, minutes


class Linear(Structure):
    """A linear layer as the kernels see it: pointers into tensors that the caller keeps alive."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "offset", "bias")),
        *((name, c_int64) for name in ("rows", "cols", "kind")),
    )


class Norm(Structure):
    """Weight and, in LayerNorm, bias: float32."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    """One block of the decoder; what a family lacks is null."""

    _fields_ = (
        *((name, Norm) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    )


class Model(Structure):
    """The sizes and parts of a decoder."""

    SIZES = ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "rotary_dim", "ffn", "moss")
    _fields_ = (
        *((name, c_int64) for name in (*SIZES, "max_cols", "quantized")),
        *((name, c_double) for name in ("eps", "rotary_factor")),
        ("rotary", c_void_p),
        ("embed", Linear),
        ("norm", Norm),
        ("layers", POINTER(Layer)),
    )


class Batch(Structure):
    """The tokens of one step and where the cache keeps theirs."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "num_new", "first", "threads")),
        *((name, c_void_p) for name in ("ids", "positions", "starts", "keys", "values")),
        *((name, c_int64) for name in ("row_stride", "head_stride", "kind")),
        ("out", c_void_p),
    )


class Library:
    """The functions of one build. Inputs and outputs are float32 on the CPU, contiguous."""

    def __init__(self, path: str, file: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(file), mode=os.RTLD_NOW)
        self._linear, self._unpack, self._step = library.moss_linear, library.moss_unpack, library.moss_step
        self._linear.argtypes = (POINTER(Linear), c_void_p, c_int64, c_void_p, c_int64)
        self._unpack.argtypes = (POINTER(Linear), c_int64, c_int64, c_void_p, c_int64, c_int64)
        self._step.argtypes = (POINTER(Model), POINTER(Batch))
        self._linear.restype = self._unpack.restype = None

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """x (n, cols) of any float dtype, n up to MAX_TOKENS -> (n, rows) float32."""
        x = x.float().contiguous()
        assert x.dim() == 2 and len(x) <= MAX_TOKENS and x.shape[1] == layer.cols, x.shape
        y = torch.empty(len(x), layer.rows)
        self._linear(layer, x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
        return y

    def unpack(self, layer: Linear, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows first to first + count of integer weights as (count, cols) in float32 or bfloat16."""
        assert layer.kind >= INT8 and first >= 0 and first + count <= layer.rows, (first, count)
        out = torch.empty(count, layer.cols, dtype=dtype)
        self._unpack(layer, first, count, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
        return out

    def step(self, model: Model, batch: Batch) -> None:
        """Write the hidden states of a batch to `batch.out`, and its keys and values to the cache."""
        if self._step(model, batch):
            raise IndexError(f"an id is not in the vocabulary of {model.embed.rows}")


def describe(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A float32 or bfloat16 weight (rows, cols), with a float32 bias (rows,) or none."""
    assert weight.is_contiguous() and (bias is None or bias.dtype == torch.float32)
    rows, cols = weight.shape
    return Linear(
        weight.data_ptr(), None, None, None if bias is None else bias.data_ptr(), rows, cols, KINDS[weight.dtype]
    )


SOFT_PAUSE = 1  # omp_pause_soft
_forked = False  # in a child, those threads do not exist, and to end them would take for ever


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def rest() -> None:
    """End the threads that OpenMP keeps for the calling thread; its next operation starts them anew.

    Where a process has more of such threads than processors, GNU's OpenMP sends all of them to sleep between two
    operations. To wake them takes longer than a small operation: decode in another thread then runs at half its speed.
    """
    if sys.platform != "linux" or _forked:
        return
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(SOFT_PAUSE)


_lock = threading.Lock()


def library(path: str | None = None) -> Library | None:
    """The kernels, built now if need be. `path` forces 'avx512', 'avx2' or 'portable'; None is the CPU's best."""
    with _lock:
        return _library(path or paths()[0])


@functools.cache
def paths() -> list[str]:
    """The paths that this CPU can run, the best first."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace")
        flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    else:  # not Linux: torch knows less, but enough
        level = torch.backends.cpu.get_cpu_capability()
        flags = {"avx2", "fma"} if level.startswith("AVX") else set()
    return [path for path, needed in PATHS.items() if flags.issuperset(needed)]


@functools.cache
def _library(path: str) -> Library | None:
    if path not in paths():
        raise ValueError(f"this CPU has no path {path!r}, it has {paths()}")
    compiler = next(filter(None, map(shutil.which, ("g++", "c++"))), None)
    if compiler is None:
        note("No C++ compiler was found (install g++): PyTorch computes instead, several times slower.")
        return None
    flags = [*FLAGS, *(f"-m{flag.replace('_', '')}" for flag in PATHS[path])]
    try:
        return Library(path, _build(compiler, flags))
    except OSError as error:
        note(f"The CPU kernels could not be built ({error}): PyTorch computes instead, slower.")
        return None


def _build(compiler: str, flags: list[str]) -> Path:
    """The shared object of this source, compiler and flags, from the cache folder or made now.

    OSError where it cannot be made, or could not be the last time.
    """
    program = Path(compiler).resolve()
    stat = program.stat()
    identity = (SOURCE.read_bytes(), program, stat.st_size, stat.st_mtime_ns, flags, platform.machine())
    name = f"kernels-{hashlib.sha256(repr(identity).encode()).hexdigest()[:20]}.so"
    target = cache_folder() / name
    failed = target.with_suffix(".failed")
    if failed.exists():
        raise OSError(f"{failed.read_text(encoding='utf-8')}; to try again, delete {failed}")
    if not target.exists():
        note("Building the CPU kernels: once, a few seconds …")
        try:
            with replacing(target) as beside, tempfile.TemporaryDirectory() as place:
                part = Path(place) / "kernels.o"
                # Linked without -fopenmp: the runtime's functions are found in the process, where torch has put them.
                for command in (
                    [compiler, *flags, "-c", str(SOURCE), "-o", str(part)],
                    [compiler, "-shared", "-Wl,--as-needed", str(part), "-o", str(beside)],
                ):
                    subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.SubprocessError as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
            reason = (said or str(error)).splitlines()[0]
            failed.write_text(reason, encoding="utf-8")
            raise OSError(f"{reason}; to try again, delete {failed}") from None
    return target


def cache_folder() -> Path:
    """Where builds are kept: the user's cache folder, or one of this process alone where that cannot be written."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moss"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(home, os.W_OK):
            return home
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        pass
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="moss-kernels-")  # removed when the process ends
