"""The tests police the documents: what they name exists, and what exists is in them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from moss.__main__ import VERBS, find
from moss.config import flags
from moss.terminal import COMMANDS
from moss.tools.base import standard_tools

ROOT = Path(__file__).parent.parent
SKIP = {".venv", ".git", "out", "build", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
TEXT = {".py", ".md", ".sh", ".toml", ".txt", ".json", ".yaml", ".yml", ""}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def sources() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file() and path.suffix in TEXT and not SKIP & set(path.relative_to(ROOT).parts)
        if not any(part.endswith(".egg-info") for part in path.relative_to(ROOT).parts)
    ]


def docs_text() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))


def test_each_verb_flag_and_tool_is_documented():
    """A command nobody can find in the documents does not exist for its users."""
    text = docs_text()
    for verb, target in VERBS.items():
        assert f"moss {verb}" in text, verb
        for name in flags(find(target)[0]):
            assert name.split("/")[-1].rstrip("+") in text, f"moss {verb} {name}"
    tools_page = (ROOT / "docs/tools.md").read_text(encoding="utf-8")
    for key, tool in standard_tools().items():
        assert f"`{key}`" in tools_page, key
        assert tool.name in tools_page, tool.name


def test_each_command_inside_the_chat_is_documented():
    """What `/help` lists has to be in the page about the chat as well."""
    page = (ROOT / "docs/chat.md").read_text(encoding="utf-8")
    for usage, _, _ in COMMANDS.values():
        assert f"`{usage}`" in page.replace("\\|", "|"), usage


def test_licence_is_declared_the_way_machines_read_it():
    """Package indexes and licence scanners read the SPDX field, people the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documents_exist(page: Path):
    """A README whose command fails is the first thing a newcomer meets."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join(_code(text))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for target in re.findall(r"\bmake ([a-z]+)\b", code):
        assert target in targets, f"{page.name}: make {target}"
    known = {
        verb: {name for flag in flags(find(target)[0]) for name in flag.split("/")} for verb, target in VERBS.items()
    }
    for line in code.splitlines():
        for match in re.finditer(r"(?:^|[`|;&(] ?)moss ([a-z]+)(?: ([a-z][a-z0-9]*))?([^|;&`]*)", line):
            first, second, rest = match.groups()
            verb = f"{first} {second}" if f"{first} {second}" in known else first
            assert verb in known, f"{page.name}: moss {first} {second or ''}"
            for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", rest)):
                assert flag in known[verb] | {"--help"}, f"{page.name}: moss {verb} {flag}"


def _code(text: str) -> list[str]:
    """The code blocks (without transcripts) and the code spans of a page."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return [*blocks, *re.findall(r"`([^`\n]+)`", prose)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page: Path):
    """A moved file leaves dead links behind."""
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_both_readmes_start_with_the_same_commands():
    """The Chinese README must not fall behind the English one."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    commands = [re.findall(r"^(?:make|moss|runs/|git|pip)[^\n#]*", "\n".join(_code(page)), re.M) for page in pages]
    assert commands[0], "README.md shows no command"
    assert commands[0] == commands[1]


def test_no_loose_ends_and_no_path_of_one_machine():
    """A note to oneself is not documentation, and a path of the author's machine fails on every other one."""
    loose = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    machine = re.compile(r"(?<![\w.:/])/(wo" r"rk|ho" r"me|Us" r"ers)/\w")
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            assert not loose.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            assert not machine.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
