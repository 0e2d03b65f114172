"""The command line as a user meets it: what it prints, where, and how it exits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moss import __main__ as cli
from moss.errors import one_line

PROBE = '''
"""A verb for these tests."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Probe:
    """Do what the test wants.

    And a second paragraph.
    """
    what: str = "ok"  # which end to come to

def main(config):
    if config.what == "value":
        raise ValueError("the bad\\n   value is 3; use 4")
    if config.what == "file":
        open("/nowhere/at/all")
    if config.what == "stop":
        raise KeyboardInterrupt
    if config.what == "bug":
        raise RuntimeError("a defect of ours")
    if config.what == "wait":
        import pathlib, time
        from moss.files import replacing
        with replacing(pathlib.Path("out.txt")):
            print("writing", flush=True)
            time.sleep(60)
    if config.what == "pipe":
        for number in range(100_000):
            print(number)
    print("done")
    return 0
'''

RUN_PROBE = (
    "import sys; from moss import __main__ as cli; cli.VERBS = {'probe': 'moss_probe:Probe'};"
    "sys.exit(cli.main(['probe', '--what', sys.argv[1]]))"
)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs `probe` and `group probe`."""
    (tmp_path / "moss_probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "VERBS", {"probe": "moss_probe:Probe", "group probe": "moss_probe:Probe"})
    monkeypatch.setattr(cli, "summary", lambda target: "Do what the test wants.")


def run(*argv: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moss", *argv], capture_output=True, text=True, timeout=120, **kwargs)


def test_success_is_zero(probe: None, capsys: pytest.CaptureFixture[str]):
    """The exit code of a verb has to reach the shell."""
    assert cli.main(["probe"]) == 0
    assert cli.main(["group", "probe"]) == 0
    assert capsys.readouterr().out == "done\ndone\n"


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("value", 1, "moss probe: the bad value is 3; use 4\n"),
        ("file", 1, "moss probe: /nowhere/at/all: No such file or directory\n"),
        ("stop", 130, "moss probe: stopped\n"),
    ],
)
def test_errors_are_one_line_on_standard_error(
    probe: None, capsys: pytest.CaptureFixture[str], what: str, code: int, line: str
):
    """A traceback for a misspelt file name tells the user that the program is broken, which it is not."""
    assert cli.main(["probe", "--what", what]) == code
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", line)


def test_an_error_names_the_file_to_be_made_and_cannot_steer_the_terminal():
    """A failed rename named the hidden half-written file; a file name or text in an error may hold escapes."""
    assert one_line(IsADirectoryError(21, "Is a directory", "a/.out.part", None, "a/out")) == "a/out: Is a directory"
    assert one_line(ValueError("no \x1b]0;owned\x07\n key")) == "no \u241b]0;owned\u2407 key"
    assert one_line(ValueError()) == "ValueError"


def test_sigterm_leaves_no_half_written_file(tmp_path: Path):
    """`kill` left `.out.txt.123.tmp` beside every file that was being written."""
    (tmp_path / "moss_probe.py").write_text(PROBE)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_PROBE, "wait"],
        env={"PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parent.parent}"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert list(tmp_path.glob(".out.txt.*.tmp"))
    process.terminate()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 143
    assert not list(tmp_path.glob("*out.txt*"))


def test_a_program_that_calls_main_keeps_its_own_handler(probe: None):
    """A notebook that runs a command must not be ended differently ever after."""
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["probe"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "line",
    [
        "data curriculum --n 0",
        "train tokenizer --vocab-size 10",
        "train sft --data x.jsonl --steps -1",
        "train pretrain --data x.jsonl --depth 0",
        "train reward --data x.jsonl --lora r=0",
        "train ppo --data x.jsonl --max-tokens 0",
        "eval tools --sets foo",
        "eval tools --langs fr",
        "eval tools --n 0",
    ],
)
def test_values_that_no_run_could_take_are_bad_usage(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """These said 1, as for a file that is not there: a script then tries the same command again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_defects_are_not_hidden(probe: None):
    """Swallowing every exception would turn our own mistakes into the user's."""
    with pytest.raises(RuntimeError, match="a defect of ours"):
        cli.main(["probe", "--what", "bug"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["probe", "group probe"]),
        (["prob"], ["did you mean 'probe'"]),
        (["xyz"], ["unknown command 'xyz'", "one of: group, probe"]),
        (["group"], ["group probe"]),
        (["group", "xyz"], ["moss group: unknown command 'xyz'"]),
        (["probe", "--whta", "1"], ["moss probe", "--whta", "see moss probe --help"]),
        (["probe", "x"], ["moss probe", "x"]),
    ],
)
def test_bad_usage_is_two(probe: None, capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]):
    """Scripts tell bad usage (2) from failed work (1); people want to know what they could have typed."""
    assert cli.main(argv) == 2
    out = capsys.readouterr()
    assert out.out == ""
    for word in words:
        assert word in out.err


def test_help_of_a_verb_shows_docstring_and_flags(probe: None, capsys: pytest.CaptureFixture[str]):
    """Help that lacks a flag leaves it unknown."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["probe", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "And a second paragraph." in out
    assert "--what WHAT" in out
    assert "which end to come to (default: ok)" in out


def test_overview_names_every_verb_with_its_first_docstring_line():
    """A verb that the overview does not list is not found; its line must be the one in the code."""
    result = run("--help")
    assert result.returncode == 0
    for verb, target in cli.VERBS.items():
        command, _ = cli.find(target)
        first = (command.__doc__ or "").strip().split("\n")[0]
        assert any(line.split() == [*verb.split(), *first.split()] for line in result.stdout.splitlines()), verb


def test_help_imports_nothing_heavy():
    """`moss --help` took seconds when torch, or even the flag parser, was imported for it."""
    code = (
        "import sys; from moss.__main__ import main; main(['--help']);"
        "print([name for name in ('torch', 'jsonargparse', 'rich', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"


def test_chat_imports_no_library_it_does_not_need():
    """transformers or sympy in the chat's imports cost a second before the first token."""
    code = (
        "import sys; import moss.terminal;"
        "print([name for name in ('sympy', 'transformers', 'matplotlib', 'scipy', 'torch._dynamo', 'moss.train.loop')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path):
    """`moss … | head -1` printed a BrokenPipeError traceback."""
    (tmp_path / "moss_probe.py").write_text(PROBE)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_PROBE, "pipe"],
        env={"PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parent.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    assert error == ""


def test_public_names_can_all_be_imported():
    """A name in the package's list that its module no longer has fails only in the user's hands."""
    import moss

    for name in moss.__all__:
        assert getattr(moss, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        _ = moss.no_such_name
