"""Every flag of every command is pinned: adding, renaming or dropping one is a decision, not an accident."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from moss.__main__ import VERBS, find, summary
from moss.config import field_docs

ROOT = Path(__file__).parent.parent
MAX_FIELDS = 25


def test_flag_list_and_command_page_are_current():
    """A flag that vanishes breaks users' scripts; a page that is not regenerated tells them lies."""
    run = subprocess.run([sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"run `make docs` and look at the difference:\n{run.stdout}{run.stderr}"


@pytest.mark.parametrize("verb", VERBS)
def test_each_command_is_small_frozen_and_documented(verb: str):
    """A settings object that can change while a run uses it, or a flag without help, hides what a run did."""
    command, run = find(VERBS[verb])
    assert callable(run)
    assert dataclasses.is_dataclass(command)
    assert command.__dataclass_params__.frozen, f"{command.__name__} is not frozen"  # type: ignore[attr-defined]
    fields = dataclasses.fields(command)
    assert len(fields) <= MAX_FIELDS, f"{command.__name__} has {len(fields)} fields"
    undocumented = [field.name for field in fields if not field_docs(command).get(field.name)]
    assert not undocumented, f"{command.__name__}: no comment beside {undocumented}"
    assert summary(VERBS[verb]), f"{command.__name__}: no docstring"
