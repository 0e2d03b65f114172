"""`moss tool`: what it prints, as text and as JSON, and the exit codes that scripts rely on."""

from __future__ import annotations

import io
import json
import sys

import pytest

from moss.tools.command import ToolCommand, main


def test_text_form(capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents: a Results body that differs from what the model sees; a reason on standard output."""
    assert main(ToolCommand('Calculate("37*12"), Solve("x+2=5")')) == 0
    assert capfd.readouterr() == ('Calculate("37*12") => 444\nSolve("x+2=5") =>\nx = 3\n', "")
    assert main(ToolCommand('Calculate("1+")')) == 1
    out, err = capfd.readouterr()
    assert out == 'Calculate("1+") => No result.\n'
    assert err == "moss tool: Calculate: it ends where a number was expected\n"


def test_json_form(capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents: renaming a field that programs read."""
    assert main(ToolCommand('Calculate("37*12") = 444, Solve("x^2=4"), Delete("x")', json=True)) == 1
    report = json.loads(capfd.readouterr().out)
    seconds = [call.pop("seconds") for call in report["calls"]]
    assert [call.pop("sources") for call in report["calls"]] == [[], [], []]
    assert report == {
        "calls": [
            {"name": "Calculate", "args": ["37*12"], "ok": True, "result": "444", "error": None},
            {"name": "Solve", "args": ["x^2=4"], "ok": True, "result": "x_0 = -2\nx_1 = 2", "error": None},
            {
                "name": "Delete",
                "args": ["x"],
                "ok": False,
                "result": "None",
                "error": "no tool is called 'Delete'; there are Search, Calculate, Solve",
            },
        ],
        "results": 'Calculate("37*12") => 444\nSolve("x^2=4") =>\nx_0 = -2\nx_1 = 2',
        "ignored": ["= 444"],
    }
    assert seconds[0] > 0
    assert seconds[2] == 0


def test_sources_have_titles_and_addresses(capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents: numbers in a result that nobody can look up, and standard output that is not what the model reads."""
    line = 'Search("Who discovered penicillin?"), Search("height of Mount Fuji")'
    assert main(ToolCommand(line, json=True)) == 0
    report = json.loads(capfd.readouterr().out)
    found = [source for call in report["calls"] for source in call["sources"]]
    assert [source["number"] for source in found] == list(range(1, 7))
    assert (found[0]["title"], found[3]["title"]) == ("Penicillin", "Mount Fuji")
    assert main(ToolCommand(line)) == 0
    out, err = capfd.readouterr()
    assert out == report["results"] + "\n"
    assert err == "".join(f"[{source['number']}] {source['title']}  {source['url']}\n" for source in found)


def test_lines_of_standard_input(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: an answer that is not on its question's line: empty lines, broken UTF-8, four calls at most."""
    lines = b'Calculate("1+1")\n\nNone\nCalculate("\xff")\r\nCalculate(1)\n' + b'Calculate("2")' * 6
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert main(ToolCommand("-", json=True)) == 0
    reports = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [report["results"] for report in reports[:5]] == [
        'Calculate("1+1") => 2',
        "None",
        "None",
        'Calculate("\ufffd") => No result.',
        "Calculate(1) => No result.",
    ]
    assert len(reports) == 6
    assert [call["ok"] for call in reports[5]["calls"]] == [True] * 4 + [False] * 2


def test_no_command_is_named() -> None:
    """Prevents: silence when someone types the expression alone."""
    with pytest.raises(ValueError, match="no command in '1\\+1'"):
        main(ToolCommand("1+1"))
