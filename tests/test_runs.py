"""The scripts in runs/ and the set-up in the Makefile: the whole road once, small, as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from moss.data import curriculum
from moss.log import read
from moss.resolve import load

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "runs" / "nano.sh"


def program(path: Path, lines: str) -> None:
    """A shell script in the place of a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def nano(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *argv], capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scala", "1"], "--scala"),
        (["--scale", "x"], "x"),
        (["--seed", "-1"], "-1"),
        (["--bundle", "--scale", "0.05"], "0.05"),  # it would leave a model that learnt nothing in the package
    ],
)
def test_bad_options_are_refused_before_anything_is_made(argv: list[str], words: str):
    """A misspelt option that is ignored starts a quarter of an hour of the wrong run."""
    result = nano(*argv)
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("exit 0", 143, "stopped in plain text (1000 documents) before"),  # SIGTERM saves, and that is a success
        ("exit 1", 1, ""),
        ("exit 2", 2, ""),
        ("exit 137", 137, ""),  # killed for memory: the same command would be killed again
        ("exit 130", 130, "stopped in plain text (1000 documents); the same command goes on from there"),
        ("kill -TERM $$", 143, "stopped in plain text (1000 documents); the same command goes on from there"),
    ],
)
def test_a_stage_that_ends_without_its_result_ends_the_run(tmp_path: Path, command: str, code: int, words: str):
    """The next stage failed for want of a file that it did not make; and `goes on from there` was said of any crash."""
    script = tmp_path / "runs" / "nano.sh"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    program(tmp_path / ".venv" / "bin" / "python", command)
    argv = [str(script), "--scale", "0.05", "--out", "out"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert result.stdout.strip() == "== plain text (1000 documents)"
    assert words in result.stderr
    assert bool(words) == bool(result.stderr)


def test_a_set_up_that_failed_for_want_of_a_package_can_be_done_again(tmp_path: Path):
    """Where Python comes without venv, the half-made .venv that its failure leaves was taken for a whole one."""
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    version_is_fine = 'test "$1" = -c && exit 0\n'
    half = version_is_fine + "mkdir -p .venv/bin; touch .venv/bin/python; chmod +x .venv/bin/python; exit 1"
    make = ["make", "-C", str(tmp_path), ".venv/.torch", f"PYTHON={python}"]
    for _ in range(2):
        program(python, half)
        result = subprocess.run(make, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2
        assert "sudo apt install python3-venv" in result.stderr
    program(python, version_is_fine + 'echo "$@" >> asked; cp pip .venv/bin')
    program(tmp_path / "pip", "exit 0")
    result = subprocess.run(make, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / ".venv" / ".torch").exists()
    assert (tmp_path / "asked").read_text() == "-m venv --clear .venv\n"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the script runs in the project's .venv")
def test_the_whole_road_small(tmp_path: Path):
    """Every stage hands the next what it needs; starting again repeats nothing and mixes nothing."""
    out = tmp_path / "nano"
    result = nano("--scale", "0.05", "--out", str(out))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    model, tok = load(out / "sft")
    assert tok.vocab_size <= model.config.vocab_size
    assert json.loads((out / "eval.json").read_text())["figures"]["calculator: called when on"]["n"]
    ask = [
        sys.executable,
        "-m",
        "moss",
        "chat",
        "--model",
        str(out / "sft"),
        "-p",
        "What is 37*12?",
        "--max-tokens",
        "32",
    ]
    answer = subprocess.run([*ask, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert {"reply", "commands", "timing"} <= json.loads(answer.stdout).keys()

    again = nano("--scale", "0.05", "--out", str(out))
    assert again.returncode == 0
    assert again.stdout.count("done before") == 13
    other = nano("--scale", "0.5", "--out", str(out))
    assert other.returncode == 1
    assert "was made with" in other.stderr


# ---------------------------------------------------------------- one_gpu.sh

NEEDS_VENV = pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="the script runs in the project's .venv"
)


def one_gpu(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "runs" / "one_gpu.sh", *argv], capture_output=True, text=True, timeout=1500)


def tiny_qwen3(folder: Path) -> Path:
    """A random Qwen3 as others save it: stock transformers, a tokenizer of another project that knows no chat."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(islice(curriculum.text(0), 400), trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 1503, "max_position_embeddings": 2048}
    config = transformers.Qwen3Config(**sizes, tie_word_embeddings=True, bos_token_id=1500, eos_token_id=1500)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--base DIR is missing"),
        (["--base", "/nowhere"], "/nowhere holds no model"),
        (["--bass", "x"], "--bass"),
        (["--base", "moss/models/nano", "--scale", "x"], "x is not a number"),
        (["--base", "moss/models/nano", "--data", "/nowhere.jsonl"], "there is no /nowhere.jsonl"),
    ],
)
def test_one_gpu_refuses_what_cannot_work_before_anything_is_made(argv: list[str], words: str):
    """Hours later, or after a first stage, is too late for a path that was misspelt."""
    result = one_gpu(*(str(ROOT / each) if each == "moss/models/nano" else each for each in argv))
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr


@pytest.mark.slow
@NEEDS_VENV
@pytest.mark.parametrize(("spec", "within"), [("r=16", "."), ("r=16,base=int4", "adapter")])
def test_any_base_becomes_an_assistant(spec: str, within: str, tmp_path: Path):
    """A base of another project, whose tokenizer knows no marker, through LoRA, preferences and PAT to an answer."""
    base, out = tiny_qwen3(tmp_path / "base"), tmp_path / "out"
    argv = ("--base", base, "--scale", "0.003", "--out", out, "--lora", spec)
    result = one_gpu(*argv)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (out / "pat" / "model.safetensors").exists() == (within == ".")
    model, tok = load(out / "pat" / within)
    assert tok.has_markers and tok.vocab_size == 1513 <= model.config.vocab_size
    kept = json.loads((out / "pat" / "adapter" / "adapter_config.json").read_text())
    assert kept["r"] == 16 and kept["peft_type"] == "LORA"
    edges = json.loads((out / "pat" / within / "moss.json").read_text())["pat"]["edges"]
    assert len(edges) == 5 and edges == sorted(edges)
    assert {"reply", "commands", "timing"} <= json.loads((out / "answer.json").read_text()).keys()

    again = one_gpu(*argv)
    assert again.returncode == 0 and again.stdout.count("done before") == 9
    other = one_gpu(*argv, "--lora", "r=4")
    assert other.returncode == 1 and "was made with" in other.stderr


# ---------------------------------------------------------------- cluster

CLUSTER = ROOT / "runs" / "cluster"


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sh"])
def test_cluster_scripts_can_be_read_and_explain_themselves(name: str):
    """A script that only a cluster can run is wrong until somebody pays for finding out; its help names the command."""
    assert subprocess.run(["bash", "-n", CLUSTER / name], timeout=60).returncode == 0
    for argv in ([], ["--help"]):
        result = subprocess.run([CLUSTER / name, *argv], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and result.stderr == ""
        assert f"runs/cluster/{name} sft --model" in result.stdout


def test_torchrun_without_a_gpu_says_what_to_do(tmp_path: Path):
    """`--nproc-per-node 0` would be torchrun's own riddle."""
    program(tmp_path / "nvidia-smi", "exit 9")
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([CLUSTER / "torchrun.sh", "sft"], env=path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "PROCESSES=2 runs/cluster/torchrun.sh sft --device cpu" in result.stderr


def test_slurm_starts_the_ranks_and_queues_again(tmp_path: Path):
    """The job must name its first machine to all, and after the signal wait for the checkpoint before it queues."""
    for name, lines in {
        "scontrol": f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> {tmp_path}/asked; fi',
        "srun": f'trap "echo saved >> {tmp_path}/asked; exit 0" TERM; echo "$NODES $FIRST $RUN $PROCESSES $*" '
        f"> {tmp_path}/ran; echo $$ > {tmp_path}/pid; while true; do sleep 0.1; done",
        "scancel": f'echo "$@" >> {tmp_path}/asked; kill -TERM "$(cat {tmp_path}/pid)"',
    }.items():
        program(tmp_path / "bin" / name, lines)
    told = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[7-8]"}
    told |= {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    job = subprocess.Popen([CLUSTER / "slurm.sh", "sft", "--out", "/shared/sft"], env=told)
    try:
        for _ in range(300):
            if (tmp_path / "pid").exists():
                break
            time.sleep(0.1)
        time.sleep(0.3)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 0
    finally:
        job.kill()
    script = "--kill-on-bad-exit=1 runs/cluster/torchrun.sh sft --out /shared/sft --resume"
    assert (tmp_path / "ran").read_text() == f"2 node7:29500 42 8 {script}\n"
    assert (tmp_path / "asked").read_text().splitlines() == ["--signal=TERM 42.0", "saved", "requeue 42"]


@pytest.mark.slow
@NEEDS_VENV
def test_torchrun_trains_on_two_processes(tmp_path: Path):
    """The script's line for torchrun is wrong in one flag, and nobody here has the cluster to see it."""
    told = os.environ | {"PROCESSES": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    argv = ["sft", "--device", "cpu", "--steps", "3", "--length", "512", "--batch-tokens", "1024"]
    result = subprocess.run(
        [CLUSTER / "torchrun.sh", *argv, "--compile", "off", "--out", tmp_path / "sft"],
        env=told,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == str(tmp_path / "sft")  # said once, by the first of them
    steps = [line for line in read(tmp_path / "sft" / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert "2 processes" in result.stderr
