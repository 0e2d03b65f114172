"""Several ranks: what they compute, decide and save together is what one process does alone."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from moss import checkpoint, dist
from moss.log import read
from moss.model import Decoder, ModelConfig
from moss.optim import make_optimizer
from moss.tokenizer import Tokenizer
from moss.train import launch, loop, pretrain
from moss.train.loss import next_token
from moss.weights import load_model
from tests.ranks import free_port, on_ranks
from tests.test_loop import model_and_batches
from tests.test_train_stages import STAGES, base_config, made  # noqa: F401 (`made` is a fixture)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------- runs


def train(folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Some runs of stages on these ranks, one after the other."""
    for stage, settings in runs:
        main, make = STAGES[stage]
        assert main(make(folder, **settings)) == 0


def curve(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read(out / "log.jsonl") if "loss" in line]


# ---------------------------------------------------------------- the same curve

ADAMW: dict[str, Any] = {"matrix_lr": 0.0, "lr": 1e-3, "steps": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", ADAMW),
    "sft": ("sft", ADAMW),
    "micro": ("sft", ADAMW | {"micro_tokens": 256}),
    "muon": ("sft", {"steps": 8}),
    "bfloat16": ("sft", ADAMW | {"dtype": "bfloat16"}),
    "reward": ("reward", ADAMW),
    "dpo": ("dpo", ADAMW),
    "pat": ("pat", ADAMW),
    "ppo": ("ppo", {"lr": 1e-3, "steps": 8}),
    "adapters": ("sft", ADAMW | {"lora": "r=4"}),
    "adapters, int8": ("reward", ADAMW | {"lora": "r=4,base=int8"}),
    "adapters, ppo": ("ppo", {"lr": 1e-3, "steps": 8, "lora": "r=4"}),
}


@pytest.fixture(scope="module")
def curves(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Each kind of run on one process (`NAME-1`) and on two ranks (`NAME-2`), with validation in between."""
    folder = tmp_path_factory.mktemp("curves")
    for world in (1, 2):
        runs = list[tuple[str, dict[str, Any]]]()
        for kind, (stage, more) in KINDS.items():
            valid = {} if stage == "ppo" else {"valid": STAGES[stage][1](made).data}
            runs.append((stage, more | valid | {"out": folder / f"{kind}-{world}", "save_every": 4}))
        train(made, runs) if world == 1 else on_ranks(world, train, made, runs)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("muon", "bfloat16")])
def test_two_ranks_are_one_process(kind: str, curves: Path) -> None:
    """Prevents gradients averaged instead of summed, a mean of the ranks' means, rows read twice or never, and a clip
    by the norm of a part: eight steps of AdamW, and the model in the end."""
    one, two = curves / f"{kind}-1", curves / f"{kind}-2"
    assert curve(two) == pytest.approx(curve(one), rel=1e-5) and len(curve(two)) == 8
    assert curve(two, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-5)
    for exact in ("tokens", "learnt", "position", "lr"):
        assert curve(two, exact) == curve(one, exact)
    valid = [[line["valid"] for line in read(out / "log.jsonl") if "valid" in line] for out in (one, two)]
    assert len(valid[0]) == len(valid[1]) == (0 if KINDS[kind][0] == "ppo" else 2)
    for figures, figures_1 in zip(valid[1], valid[0], strict=True):
        assert figures == pytest.approx(figures_1, rel=1e-4, abs=1e-6)
    assert apart(two / "step-000008", one / "step-000008") < 1e-4
    finished = [path for path in one.rglob("*.safetensors") if "step-" not in str(path.relative_to(one))]
    assert finished and all(file.stat().st_size == (two / file.relative_to(one)).stat().st_size for file in finished)


def apart(a: Path, b: Path) -> float:
    """How far the weights of two checkpoints, models or adapters, are from each other; the worst parameter, relative
    to its size."""
    mine, theirs = (load_file(next(folder.glob("*model.safetensors"))) for folder in (a, b))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - it).norm() / it.norm().clamp(min=1e-3)) for name, it in theirs.items())


def test_muon_and_bfloat16_follow_one_process(curves: Path) -> None:
    """Prevents a matrix orthogonalised in parts, and computing in another dtype than asked for: in bfloat16, which both
    round in, curves agree to a hundredth and not to the bit."""
    for kind in ("muon", "bfloat16"):
        one, two = curve(curves / f"{kind}-1"), curve(curves / f"{kind}-2")
        assert two == pytest.approx(one, rel=0.01) and two[-1] < two[0]
    assert curve(curves / "bfloat16-2")[1:] != pytest.approx(curve(curves / "sft-2")[1:], rel=1e-6)
    weights = load_model(curves / "bfloat16-2" / "step-000008").embed.weight
    assert not torch.equal(weights, weights.bfloat16().float())  # what is kept is float32


# ---------------------------------------------------------------- gradients and models


def parts(kind: str) -> Decoder:
    """Toys of both families, tied and not, with biases, and with a scalar head of fewer rows than ranks."""
    sizes: dict[str, Any] = {"vocab_size": 29, "num_layers": 2, "hidden": 32, "num_heads": 4, "max_length": 64}
    more: dict[str, Any] = {"moss": {"family": "moss", "rotary_dim": 4}, "tied": {"tie_embeddings": True}}.get(kind, {})
    model = Decoder(ModelConfig(**sizes, **more), "scalar" if kind == "scalar" else "lm")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.empty_like(weight).normal_(0, 0.1, generator=generator))
    return model


def toy_loss(net: Decoder, batch: loop.Micro) -> loop.Loss:
    """Cross-entropy, or the squares of all scores by way of the head's weight, as the losses of stages use it."""
    if net.head_kind == "lm":
        return next_token(net, batch)
    assert net.head is not None
    hidden = net.hidden(batch["ids"], positions=batch["positions"], segments=batch["segments"])
    return loop.Loss((hidden @ net.head.weight[0]).square().sum(), batch["ids"].numel())


def as_whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if dist.is_sharded(tensor) else tensor


def gradients_of(kind: str, recompute: bool) -> list[Any]:
    """(loss, norm, count) and the gradient, whole, of one step on the ranks that there are; and of a frozen step."""
    model = parts(kind)
    _, batches = model_and_batches()
    rows = batches(0)[0][0]
    own = len(rows["ids"]) // dist.world()
    micro = [{name: value[at : at + 2] for name, value in rows.items()} for at in range(dist.rank() * own, 8, 2)][
        : own // 2
    ]
    if dist.world() > 1:
        dist.shard(model, torch.float32)
    if recompute:
        dist.recompute(model)
    told: list[Any] = []
    for frozen in (False, True, False):  # and learnt again, as gradual unfreezing does
        model.blocks[0].requires_grad_(not frozen)
        loss, norm, count, _ = loop.gradients(model, model, toy_loss, micro)
        grads = [weight.grad for weight in model.parameters()]
        told.append((loss, norm, count, [as_whole(grad).tolist() for grad in grads if grad is not None]))
        model.zero_grad(set_to_none=True)
    return told


@pytest.mark.parametrize("kind", ["llama", "tied", "moss", "scalar"])
def test_gradients_are_those_of_one_process(kind: str) -> None:
    """Prevents tied weights whose two gradients lose one half, a head used outside the model, a parameter with fewer
    rows than ranks, frozen blocks that learn, and blocks computed twice to other numbers."""
    alone = gradients_of(kind, recompute=False)
    for world, recompute in ((1, True), (2, False), (2, True)):
        results = [gradients_of(kind, recompute)] if world == 1 else on_ranks(world, gradients_of, kind, recompute)
        for told in results:
            for (loss, norm, count, grads), (loss_1, norm_1, count_1, grads_1) in zip(told, alone, strict=True):
                assert count == count_1 and loss == pytest.approx(loss_1, rel=1e-6)
                assert norm == pytest.approx(norm_1, rel=1e-5)
                for grad, grad_1 in zip(grads, grads_1, strict=True):
                    grad, grad_1 = torch.tensor(grad), torch.tensor(grad_1)
                    assert float((grad - grad_1).norm()) <= 1e-5 * float(grad_1.norm())


def test_recomputed_blocks_keep_less() -> None:
    """Prevents activation checkpointing that checkpoints nothing: what is kept for the backward pass shrinks, and each
    block is computed twice."""
    kept, calls = [], []
    for recompute in (False, True):
        model, size, count = parts("llama"), [0], [0]
        model.blocks[0].get_submodule("attn").register_forward_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        if recompute:
            dist.recompute(model)

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        _, batches = model_and_batches()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = next_token(model, batches(0)[0][0])
        loss.total.backward()
        kept.append(size[0])
        calls.append(count[0])
    assert calls == [1, 2] and kept[1] < kept[0] / 3


# ---------------------------------------------------------------- decisions


def bad_numbers(bad: float, rank: int) -> list[Any]:
    """Four steps, of which the second is bad on one rank; the weights after each, and what the log says."""
    model, batches = model_and_batches()
    dist.shard(model, torch.float32)
    told: list[Any] = []

    def own(position: int) -> tuple[list[loop.Micro], int]:
        (rows,), after = batches(position)
        told.append(float(torch.cat([as_whole(weight.detach()).flatten() for weight in model.parameters()]).sum()))
        return [{name: value[dist.rank() :: dist.world()] for name, value in rows.items()}], after

    def loss_fn(net: Decoder, batch: loop.Micro) -> loop.Loss:
        loss = next_token(net, batch)
        broken = len(told) == 2 and dist.rank() == rank
        return loop.Loss(loss.total * bad if broken else loss.total, loss.count)

    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0, muon=False)
    state = loop.run(model, own, loss_fn, optimizer, lambda step: 1.0, steps=4, state=loop.State())
    return [*told, state.updates, state.bad]


def test_a_bad_number_on_one_rank_stops_the_update_on_all() -> None:
    """Prevents ranks that part for ever because one of them skipped a step: a nan, and an infinite gradient."""
    for bad in (math.nan, math.inf):
        first, second = on_ranks(2, bad_numbers, bad, 1)
        assert first == second
        *sums, updates, now = first
        assert sums[1] == sums[2] and len(set(sums)) == 3 and (updates, now) == (3, 0)


def interrupted(out: Path, folder: Path) -> tuple[int, int]:
    """A long run whose rank 1 alone is told to end in its third step: exit code, and the step that is saved."""
    judge = loop.judge

    def third(state: loop.State, loss: float, norm: float) -> str:
        if state.step == 3 and dist.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return judge(state, loss, norm)

    loop.judge = third
    code = pretrain.main(base_config(folder, out=out, steps=100))
    return code, max(step for step, _ in checkpoint.steps(out))


def test_one_rank_that_is_told_to_end_ends_all(made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Prevents ranks that go on without one that has ended, and steps that only some of them have done."""
    assert on_ranks(2, interrupted, tmp_path / "run", made) == [(0, 3)] * 2
    assert curve(tmp_path / "run", "step") == [1, 2, 3]


def short(out: Path, folder: Path) -> int:
    """A run of two ranks, one of which has memory for all its rows at a time and one for a single row."""
    launch.free_memory = lambda device: 1e12 if dist.rank() == 0 else 1e4
    return pretrain.main(base_config(folder, out=out, steps=2))


def test_ranks_with_unequal_memory_pick_one_micro_batch(made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Prevents ranks that go through their weights a different number of times, and wait for each other for ever."""
    assert on_ranks(2, short, tmp_path / "run", made) == [0, 0]
    assert checkpoint.read_info(tmp_path / "run" / "step-000002")["micro_rows"] == 1


def refused(out: Path, folder: Path) -> str:
    try:
        pretrain.main(base_config(folder, out=out, steps=1))
    except ValueError as error:
        return str(error)
    except SystemExit as ended:
        return f"exit {ended.code}"
    return "trained"


def test_rank_zero_holds_the_folder_for_all(made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Prevents ranks that refuse each other's lock, and ranks that wait for one that was refused."""
    with checkpoint.lock(tmp_path / "run"):
        first, second = on_ranks(2, refused, tmp_path / "run", made)
    assert "in use by process" in first and second == "exit 1"
    with pytest.raises(ValueError, match="8 rows do not go evenly to 3 processes"):
        raise ValueError(on_ranks(3, refused, tmp_path / "three", made)[0])


# ---------------------------------------------------------------- checkpoints


class Two(nn.Module):
    """Two decoders that train together, as PPO's do."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.critic = parts("tied"), parts("scalar")

    def parts(self) -> dict[str, Decoder]:
        return {"": self.policy, "critic": self.critic}


def save_two(folder: Path, tokenizer: Path, full: str) -> list[str]:
    """A step of two decoders with Muon and AdamW, then a checkpoint on these ranks; then one that fails on one rank."""
    model = Two()
    launch.place(model, torch.device("cpu"), torch.bfloat16)
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.1, muon=True)
    _, batches = model_and_batches()
    (rows,), _ = batches(0)
    for _ in range(2):
        for decoder in model.parts().values():
            toy_loss(decoder, rows).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"optimizer": optimizer.state_dict(), "rng": {"cpu": torch.zeros(1)}, "data": {"block": torch.ones(3)}}
    info: dict[str, Any] = dict.fromkeys(checkpoint.INFO, "") | {"format": 1}

    def save(step: int) -> Path:
        tok = Tokenizer.load(tokenizer)
        return checkpoint.save(folder, step, parts=model.parts(), tokenizer=tok, state=state, info=info)

    path = save(1)
    told = []
    if full == "disk of rank 1" and dist.rank() == 1:
        torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data = no_space  # type: ignore[method-assign]
    if full == "disk of rank 0" and dist.rank() == 0:
        checkpoint.save_model = no_space  # type: ignore[attr-defined]
    try:
        save(2)
    except OSError as error:
        told.append(str(error))
    _, back = checkpoint.load(path)
    same = [torch.equal(one.to_local(), other.to_local()) for one, other in sharded(back, state)]
    momentum = 2 * 2 * 7  # of the matrices in two blocks of two models; of all else two moments
    assert all(same) and len(same) == momentum + 2 * (len(list(model.parameters())) - momentum)
    return told


def sharded(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """The sharded tensors of two nested states, in pairs; all else is equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            yield from sharded(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            yield from sharded(one, other)
    elif isinstance(a, Tensor) and dist.is_sharded(a):
        yield a, b
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", ["disk of rank 0", "disk of rank 1"])
def test_a_full_disk_on_one_rank_is_one_on_all(full: str, made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Prevents a rank that goes on while another has given up, half a checkpoint under its name, and the loss of the
    earlier one; several decoders, Muon's momentum and bfloat16 among what is saved."""
    told = on_ranks(2, save_two, tmp_path, made / "tok", full)
    assert all(len(words) == 1 for words in told) and "No space" in told[0][0] + told[1][0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    path = checkpoint.newest(tmp_path, print)
    assert path and {file.name for file in (path / "optimizer").iterdir()} == {
        "state.pt",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    }
    assert load_model(path / "critic").head_kind == "scalar"
    _, state = checkpoint.load(path)
    plain = Two()
    optimizer = make_optimizer(plain, lr=1e-2, weight_decay=0.1, muon=True)
    optimizer.load_state_dict(state["optimizer"])  # whole, on one process
    for part in optimizer.parts:
        for weight, held in part.state.items():
            assert all(value.shape == weight.shape for name, value in held.items() if name != "step")
    assert torch.equal(state["data"]["block"], torch.ones(3))


def test_a_damaged_shard_is_seen(made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Prevents a run that goes on from a checkpoint in which one rank's part is cut, changed or gone."""
    on_ranks(2, save_two, tmp_path, made / "tok", "no disk")
    good, bad = tmp_path / "step-000001", tmp_path / "step-000002"
    shard = bad / "optimizer" / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    said: list[str] = []
    content[-1] ^= 1
    for damaged in (bytes(content), bytes(content[:-4]), b""):
        shard.write_bytes(damaged)
        assert checkpoint.newest(tmp_path, said.append) == good
    shard.unlink()
    assert checkpoint.newest(tmp_path, said.append) == good
    assert ["is damaged" in said[0], "bytes instead of" in said[1], "is missing" in said[3]] == [True] * 3
    with pytest.raises(ValueError, match=r"the shards in .* cannot be read"):
        checkpoint.load(bad)  # as if the manifest had told nothing


RESUMED: list[tuple[str, int, int]] = [("", 2, 2), ("", 2, 1), ("", 2, 4), ("", 1, 2), ("r=4", 2, 1), ("r=4", 1, 2)]


@pytest.fixture(scope="module")
def halves(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Four steps on one process and on two ranks, and eight that were never interrupted; with adapters and without."""
    folder = tmp_path_factory.mktemp("halves")
    runs: dict[str, list[tuple[str, dict[str, Any]]]] = {"unbroken": [], "1": [], "2": []}
    for name, lora in [(name, lora) for name in runs for lora in ("", "r=4")]:
        steps = 8 if name == "unbroken" else 4
        settings = ADAMW | {"schedule": "constant", "lora": lora, "steps": steps, "out": folder / f"{lora}{name}"}
        runs[name].append(("sft", settings))
    train(made, runs["unbroken"] + runs["1"])
    on_ranks(2, train, made, runs["2"])
    return folder


@pytest.mark.parametrize(("lora", "before", "after"), RESUMED)
def test_a_run_goes_on_with_other_ranks(
    lora: str,
    before: int,
    after: int,
    halves: Path,
    made: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Prevents optimizer state cut for other ranks than there are, and data seen twice or never after the change."""
    out = tmp_path / "run"
    shutil.copytree(halves / f"{lora}{before}", out)
    runs = [("sft", ADAMW | {"schedule": "constant", "lora": lora, "out": out, "resume": True})]
    train(made, runs) if after == 1 else on_ranks(after, train, made, runs)
    unbroken = halves / f"{lora}unbroken"
    assert curve(out) == pytest.approx(curve(unbroken), rel=1e-5) and len(curve(out)) == 8
    assert curve(out, "position") == curve(unbroken, "position")
    assert apart(out / "step-000008", unbroken / "step-000008") < 1e-4
    mine, theirs = (checkpoint.load(folder / "step-000008")[1]["optimizer"] for folder in (out, unbroken))
    assert mine["parts"][0]["param_groups"] == theirs["parts"][0]["param_groups"]
    for number, held in theirs["parts"][0]["state"].items():
        for name, value in held.items():
            other = mine["parts"][0]["state"][number][name]
            assert float((other - value).norm()) <= 1e-4 * float(value.norm()), (number, name)


# ---------------------------------------------------------------- torchrun


@pytest.fixture
def torchrun(made: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:  # noqa: F811
    """A long run of two ranks under the real launcher, some steps on."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    words += ["--master-port", str(free_port()), "-m", "moss", "train", "pretrain", "--data", str(made / "text.jsonl")]
    words += ["--model", str(made / "tok"), "--depth", "1", "--steps", "100000", "--batch-tokens", "512"]
    words += ["--length", "64", "--compile", "off", "--save-every", "5", "--out", str(out)]
    names = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(words, cwd=ROOT, env=names, stderr=subprocess.PIPE, text=True) as agent:
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until and not checkpoint.steps(out) and agent.poll() is None:
                time.sleep(0.05)
            assert checkpoint.steps(out), agent.stderr.read() if agent.stderr and agent.poll() is not None else "slow"
            yield agent, out
        finally:
            for pid in children(agent.pid):
                os.kill(pid, signal.SIGKILL)
            agent.kill()


def children(pid: int) -> list[int]:
    return [int(file.parent.name) for file in Path("/proc").glob("[0-9]*/stat") if parent(file) == pid]


def parent(stat: Path) -> int:
    """The parent's number in a process's `stat`: the second word after its name; 0 where it has just ended."""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_torchrun_is_told_to_end(torchrun: tuple[subprocess.Popen, Path]) -> None:
    """Prevents work lost when a scheduler takes the machines away: all ranks end at one step, which is saved."""
    agent, out = torchrun
    ranks = children(agent.pid)
    agent.send_signal(signal.SIGTERM)
    _, said = agent.communicate(timeout=60)
    assert len(ranks) == 2 and gone(ranks)
    assert said.count("--resume goes on from there") == 1 and "SIGTERM" in said
    newest = checkpoint.newest(out, print)
    assert newest and newest.name == f"step-{read(out / 'log.jsonl')[-1]['step']:06d}"
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_run(number: int, torchrun: tuple[subprocess.Popen, Path]) -> None:
    """Prevents ranks that wait for ever for one that is gone, and the loss of the last checkpoint with it."""
    agent, out = torchrun
    ranks = children(agent.pid)
    first = int((out / ".lock").read_text().split()[1])
    os.kill(first if number == 0 else next(pid for pid in ranks if pid != first), signal.SIGKILL)
    agent.communicate(timeout=90)
    assert agent.returncode != 0 and gone(ranks)
    with checkpoint.lock(out):
        newest = checkpoint.newest(out, print)
    assert newest
    checkpoint.load(newest)
    load_model(newest)
