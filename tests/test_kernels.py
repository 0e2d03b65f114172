"""The kernels on every path this CPU has, against float64, and how they are built."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moss.engine import kernels
from moss.engine.kernels import GROUP, MAX_TOKENS, PATHS, Library, describe, library, paths
from moss.engine.quant import QuantLinear

# Whole groups, part of a group, fewer rows than a tile, more groups than one vector of scales holds.
SHAPES = [(64, 256), (37, 300), (5, 17), (3, 2304), (130, 704)]
KINDS = ["float32", "bfloat16", "int8", "int4"]
# None may drop out of the tests unseen: a path is skipped where the CPU lacks it, and for nothing else.
EACH_PATH = [
    pytest.param(path, marks=pytest.mark.skipif(path not in paths(), reason=f"this CPU lacks {' '.join(needed)}"))
    for path, needed in PATHS.items()
]


def kernels_of(path: str) -> Library:
    found = library(path)
    assert found is not None
    return found


def layer_of(kind: str, rows: int, cols: int):
    """What the kernels get, the exact weight as float64, the bias, and who keeps the memory."""
    generator = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    bias = torch.randn(rows, generator=generator) * 0.1
    if kind in ("int8", "int4"):
        owner = QuantLinear(weight, bias, kind)
        return owner.describe(), owner.dequantize().double(), bias.double(), owner
    weight = weight.to(getattr(torch, kind))
    return describe(weight, bias), weight.double(), bias.double(), (weight, bias)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the integer kernels see them: 255 levels a group of 128."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((groups / step).round() * step).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc")
def test_a_path_is_missing_only_where_the_cpu_lacks_it():
    """What is wrongly thought to be missing costs half the speed or more, and would skip its own tests."""
    told = {name.replace("_", "").replace("fma3", "fma") for name, has in torch.cpu.get_capabilities().items() if has}
    assert paths() == [path for path, needed in PATHS.items() if told.issuperset(f.replace("_", "") for f in needed)]


@pytest.mark.parametrize("path", EACH_PATH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_linear_is_exact_for_its_inputs(kind: str, path: str, rows: int, cols: int):
    """Every path, every number of tokens, sizes that fill no register: the product of these weights and inputs."""
    layer, weight, bias, _owner = layer_of(kind, rows, cols)
    x = torch.randn(MAX_TOKENS, cols, generator=torch.Generator().manual_seed(1))
    seen = x if kind in ("float32", "bfloat16") else rounded(x)
    expected = seen.double() @ weight.T + bias
    for n in (1, 2, 3, 4, 5, 7, 16):
        y = kernels_of(path).linear(layer, x[:n])
        # An activation half way between two levels may go either way: one level of one value.
        slack = 0.0 if kind in ("float32", "bfloat16") else float(x.abs().max() / 127 * weight.abs().max())
        torch.testing.assert_close(y.double(), expected[:n], rtol=2e-6, atol=2e-6 + slack)
        assert float((y - expected[:n]).norm() / expected[:n].norm()) < 2e-5 + slack / 10


@pytest.mark.parametrize("path", EACH_PATH)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_same_in_every_batch_and_on_any_threads(kind: str, path: str):
    """Bit for bit: otherwise what a user reads depends on who else is served, and on the machine's cores."""
    layer, *_, _owner = layer_of(kind, 131, 704)
    x = torch.randn(MAX_TOKENS, 704, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([kernels_of(path).linear(layer, row[None]) for row in x])
    for n in (2, 5, 16):
        assert torch.equal(kernels_of(path).linear(layer, x[:n]), alone[:n])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        assert torch.equal(kernels_of(path).linear(layer, x), alone)
    finally:
        torch.set_num_threads(threads)


# Bounds of the relative RMS error of W x: against what the integers stand for, and against the floats they were.
ERRORS = {
    ("int8", ""): (0.007, 0.011),
    ("int4", ""): (0.007, 0.100),
    ("int8", "weights"): (0.007, 0.030),
    ("int4", "weights"): (0.007, 0.120),
    ("int8", "inputs"): (0.016, 0.019),
    ("int4", "inputs"): (0.016, 0.100),
}


@pytest.mark.parametrize("path", EACH_PATH)
@pytest.mark.parametrize(("kind", "outliers"), ERRORS)
def test_the_error_of_integers_is_as_stated(kind: str, outliers: str, path: str):
    """Normal weights and inputs; one weight in a thousand ten times as large; one input that stands out by 30."""
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(512, 2048, generator=generator), torch.randn(16, 2048, generator=generator)
    if outliers == "weights":
        weight *= torch.where(torch.rand(weight.shape, generator=generator) < 0.001, 10, 1)
    elif outliers == "inputs":
        x[:, 77] += 30
    owner = QuantLinear(weight, None, kind)
    y = kernels_of(path).linear(owner.describe(), x).double()
    for exact, bound in zip((owner.dequantize(), weight), ERRORS[kind, outliers]):
        expected = x.double() @ exact.double().T
        assert 0.8 * bound < float((y - expected).norm() / expected.norm()) < bound


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_there_is_one_openmp_runtime():
    """A second runtime brings its own threads: two pools fight for the same cores."""
    code = (
        "import torch; from moss.engine.kernels import library; from moss.engine.quant import QuantLinear;"
        "layer = QuantLinear(torch.ones(8, 128), None, 'int8'); layer(torch.ones(1, 128));"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1].split('/')[-1]})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    found = eval(done.stdout)
    assert len(found) == 1, found
    assert "torch" in found.pop()


def compiler(place: Path, body: str) -> str:
    """A stand-in for a compiler."""
    program = place / "g++"
    program.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels._library.cache_clear()
    yield tmp_path
    kernels._library.cache_clear()


def test_a_build_is_published_whole_and_found_again(fresh: Path, capfd: pytest.CaptureFixture[str]):
    """A process that starts while another one builds must not load half a file."""
    # Writes the first half, shows what a second process would find now, then the rest.
    program = compiler(
        fresh,
        f'for last; do :; done; printf half > "$last"; ls {fresh}/cache/moss >> {fresh}/seen; printf whole > "$last"',
    )
    target = kernels._build(program, ["-O2"])
    assert target.read_text() == "whole"
    assert not [name for name in (fresh / "seen").read_text().split() if name.endswith(".so")]
    assert list(target.parent.iterdir()) == [target]
    assert capfd.readouterr().err.count("Building the CPU kernels") == 1
    assert kernels._build(program, ["-O2"]) == target
    assert capfd.readouterr().err == ""
    assert kernels._build(program, ["-O2", "-mavx2"]) != target


def test_without_a_compiler_one_line_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """A laptop without g++ must still chat, and its user must learn why it is slow."""
    monkeypatch.setenv("PATH", str(fresh))
    assert library() is None
    assert library() is None
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "install g++" in told


def test_a_failed_build_is_one_line_and_remembered(fresh: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """A broken compiler must not end the chat, leave half a build, or keep every start waiting for it to fail again."""
    program = f"echo run >> {fresh}/runs; echo 'fatal error: omp.h' >&2; echo more >&2; exit 1"
    compiler(fresh, program)
    monkeypatch.setenv("PATH", f"{fresh}:/usr/bin:/bin")
    assert library() is None
    told = capfd.readouterr().err
    assert told.count("\n") == 2
    assert "fatal error: omp.h" in told
    (left,) = (fresh / "cache" / "moss").iterdir()
    kernels._library.cache_clear()  # as in the next process
    assert library() is None
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert f"fatal error: omp.h; to try again, delete {left}" in told
    assert (fresh / "runs").read_text() == "run\n"
    left.unlink()
    kernels._library.cache_clear()
    assert library() is None
    assert (fresh / "runs").read_text() == "run\nrun\n"
    compiler(fresh, f"{program} # another compiler")  # is tried at once
    kernels._library.cache_clear()
    assert library() is None
    assert (fresh / "runs").read_text() == "run\nrun\nrun\n"


def test_a_build_that_takes_for_ever_is_remembered(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a compiler hangs, every process waited for as long as a build may take."""
    program = compiler(fresh, "echo thinking >&2; exec sleep 60")
    monkeypatch.setattr(kernels, "BUILD_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(OSError, match=r"timed out after .*; to try again, delete"):
            kernels._build(program, ["-O2"])
        monkeypatch.setattr(kernels.subprocess, "run", None)  # the second time nothing is started


def test_a_cache_folder_that_cannot_be_made(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    """A read-only home folder costs a build a start, not the kernels."""
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    folder = kernels.cache_folder()
    assert folder.is_dir()
    assert not folder.is_relative_to(fresh)


def test_a_user_without_a_home_folder(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    """Containers often run as a user that nobody knows; the chat must start there, too."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernels.Path, "home", nowhere)
    assert kernels.cache_folder().is_dir()


def test_an_unknown_path_is_refused():
    """A mistyped path must not silently be another one."""
    with pytest.raises(ValueError, match="no path 'avx1024'"):
        library("avx1024")


REST = """
import os, torch
from moss.engine.kernels import rest
torch.set_num_threads(2)
def threads():
    return len(os.listdir("/proc/self/task"))
torch.ones(1 << 22).add_(1)
busy = threads()
rest()
assert threads() == busy - 1, (busy, threads())
assert torch.ones(1 << 22).add_(1).sum() == 2 << 22  # they come again
if os.fork() == 0:
    rest()  # would wait for threads that a child does not have
    os._exit(0)
assert os.wait()[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_rest_ends_the_threads_of_the_caller() -> None:
    """With those of the thread that loaded the model awake, decode in another ran at half its speed."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", REST], env=environment, check=True, timeout=120)
