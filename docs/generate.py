"""Write docs/commands.md (the help of every command) and tests/flags.txt (the pinned list of flags).

Both are made from the commands' dataclasses, so that documentation cannot drift from the code. `--check` writes
nothing and says what is stale; the tests call it.

    make docs                          # or: python -m docs.generate [--check]
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from moss.__main__ import VERBS, find
from moss.config import build_parser, flags

ROOT = Path(__file__).parent.parent


def commands_page() -> str:
    """docs/commands.md: one section a verb, holding exactly what `--help` prints."""
    parts = [
        "# Commands\n",
        "<!-- made by `make docs` from the commands' dataclasses; edit those -->\n",
        "`moss --help` lists the commands; `moss COMMAND --help` prints what stands here. Every command takes"
        " `--config FILE`, a JSON or YAML file with values for its flags (names with `_` for `-`); flags on the"
        " command line win over it. Exit codes: 0 success, 1 an error in the input or the system, said in one line"
        " on standard error, 2 bad usage, 130 stopped with Ctrl-C.\n",
    ]
    for verb, target in VERBS.items():
        command, _ = find(target)
        text = build_parser(command, prog=f"moss {verb}").format_help().strip()
        parts.append(f"## moss {verb}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def flags_list() -> str:
    """tests/flags.txt: a line for each flag of each command."""
    lines = []
    for verb, target in VERBS.items():
        lines += [f"moss {verb} {name}" for name in flags(find(target)[0]) if name not in ("-h/--help", "--config")]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    stale = 0
    for path, text in ((ROOT / "docs/commands.md", commands_page()), (ROOT / "tests/flags.txt", flags_list())):
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if "--check" in argv:
            stale += old != text
            name = str(path.relative_to(ROOT))
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), name, "now"))
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
