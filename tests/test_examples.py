"""What stands in examples/ is run as a reader would: offline, with the bundled model.

What the model says is not compared: another model says it in other words. What kind of thing each cell shows is.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from examples.run import execute
from moss import __main__ as cli
from moss.tools.own import load_tools

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read(path: Path) -> list[NotebookNode]:
    """The code cells of a notebook as it stands."""
    return code(nbformat.read(path, as_version=4))


def kinds(cell: NotebookNode) -> list[str]:
    """What a cell shows: text on standard output, a value."""
    return [out.get("name", out.output_type) for out in cell.outputs]


def text(cell: NotebookNode) -> str:
    """All that a cell shows, as text."""
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_runs_and_shows_what_the_page_shows(path: Path, tmp_path: Path):
    """An example that fails, or shows something else than on the page, is worse than none."""
    for before, now in zip(read(path), code(execute(path, tmp_path)), strict=True):
        assert kinds(now) == kinds(before), now.source
        assert bool(text(now).strip()) == bool(text(before).strip()), now.source
    assert list(tmp_path.iterdir()) == [], "the notebook leaves files behind"


@pytest.mark.slow
def test_a_notebook_that_needs_the_network_fails(tmp_path: Path):
    """Without this the tests would only say that the network was there."""
    path = tmp_path / "online.ipynb"
    source = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)"
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), path)
    with pytest.raises(CellExecutionError, match=r"reached for \('192\.0\.2\.1', 80\)"):
        execute(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_page_holds_the_outputs_of_one_run(path: Path):
    """A notebook saved half run, or with the messages of its author's machine, misleads who reads it."""
    cells = read(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {kind for cell in cells for kind in kinds(cell)} == {"stdout", "execute_result"}
    assert path.stat().st_size < 20_000


def test_the_talk_shows_the_whole_interface():
    """The README points to this notebook for what it only hints at."""
    shown = {cell.source: text(cell) for cell in read(ROOT / "examples" / "talk.ipynb")}
    sources = "\n".join(shown)
    for name in ("chat.stream(", "chat.ask(", "chat.tools", "@moss.tool(", "chat.history", "chat.save(", '.load("talk'):
        assert name in sources, name
    loaded = next(out for source, out in shown.items() if "chat = moss.load()" in source)
    assert re.fullmatch(r"<moss\.Chat with moss-nano, \d+\.\dM parameters as \w+, 0 turns>", loaded)
    streamed = next(out for source, out in shown.items() if "chat.stream(" in source)
    assert re.search(r"\[Calculate: \d+\]\n.*\d+ tokens\n", streamed, re.S), streamed


# --------------------------------------------------------------------------------------------------- tools of one's own

OWN = ROOT / "examples" / "own_tool.py"
FOUND = ((1, "sky.md"), (2, "other.txt"), (3, "sky.md"))  # the numbers in the results, and the files that they name


def test_the_lines_at_the_head_of_the_tools_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """The first thing that a reader copies."""
    (tmp_path / "sky.md").write_text("About roofs.\n\nThe sky is blue\nbecause of Rayleigh.", encoding="utf-8")
    (tmp_path / "other.txt").write_text("A blue house.\n", encoding="utf-8")
    (tmp_path / "not.pdf").write_bytes(b"blue sky")
    lines = re.findall(r"^    (?:NOTES=\S+ )?moss (.*)", OWN.read_text(encoding="utf-8"), re.M)
    assert [shlex.split(line)[0] for line in lines] == ["tool", "chat"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NOTES", str(tmp_path))
    assert cli.main(shlex.split(lines[0])) == 0
    assert capfd.readouterr().out == 'DaysBetween("2024-02-28", "2024-03-01") =>\n2 days\n'
    assert cli.main([*shlex.split(lines[1]), "-p", "What is 37*12?", "--json"]) == 0
    assert '"results": "Calculate(\\"37*12\\") => 444"' in capfd.readouterr().out
    assert (
        cli.main(["tool", "--tools-from", str(OWN), 'FindNote("blue sky"), FindNote("roofs.", "1"), FindNote("x")'])
        == 1
    )
    out, err = capfd.readouterr()
    assert out == (
        "FindNote(\"blue sky\") =>\n<|1|>: 'The sky is blue because of Rayleigh.'\n<|2|>: 'A blue house.'\n"
        'FindNote("roofs.", "1") =>\n<|3|>: \'About roofs.\'\nFindNote("x") =>\nNo result.\n'
    )
    files = [f"[{number}] {name.partition('.')[0]}  {(tmp_path / name).as_uri()}" for number, name in FOUND]
    assert err.splitlines() == [*files, "moss tool: FindNote: nothing found"]


def test_the_tools_say_what_to_mend(monkeypatch: pytest.MonkeyPatch, capfd):
    """An example of a tool is also one of its errors."""
    monkeypatch.delenv("NOTES", raising=False)
    assert cli.main(["tool", "--tools-from", str(OWN), 'DaysBetween("tomorrow"), FindNote("x")']) == 1
    assert capfd.readouterr().err.splitlines() == [
        "moss tool: DaysBetween: 'tomorrow' is no date; write it as 2024-02-28",
        "moss tool: FindNote: set NOTES to the folder with your notes, files in .md or .txt",
    ]
    days = load_tools(OWN)["days_between"]
    assert days.api == "DaysBetween(first)" and str(days("2024-01-01")).endswith(" days")
