"""Imports go downwards only, so that each part can be read, tested and used without the ones above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {"core": 0, "engine": 1, "tools": 2, "data": 3, "train": 4, "synth": 4, "evals": 4, "serve": 5, "entry": 6}
# Files at the top level that stand higher than the core: they load an engine's model, or start everything.
HIGHER = {
    **dict.fromkeys(("lora", "peft", "resolve"), "engine"),
    **dict.fromkeys(("__main__", "terminal", "screen", "session"), "entry"),
}
HEAVY = {"transformers", "matplotlib", "sympy", "huggingface_hub"}  # never in the core
FILES = sorted((ROOT / "moss").rglob("*.py"))


def layer(module: str) -> str:
    """The layer of "moss.tools.run"."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in LAYERS:
        return parts[1]
    return HIGHER.get(parts[1], "core") if len(parts) > 1 else "core"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it stands inside a function) for every import in a file."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((name.name, inside) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import hides where a name comes from"
                found.append((child.module or "", inside))
                found.extend((f"{child.module}.{name.name}", inside) for name in child.names if child.module == "moss")
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    walk(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_go_downwards(path: Path):
    """An import upwards ties the engine to the chat format or a tool to the server, and ends in a circle."""
    own = layer(module_of(path))
    for module, _ in imports(path):
        if module.split(".")[0] != "moss" or module in ("moss", "moss.__version__"):
            continue
        other = layer(module)
        assert other == own or LAYERS[other] < LAYERS[own], f"{module_of(path)} ({own}) imports {module} ({other})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_own_modules_are_imported_at_the_top(path: Path):
    """An import inside a function hides a dependency; only the table of verbs may import late."""
    if path.name == "__main__.py":
        return
    late = [module for module, inside in imports(path) if inside and module.split(".")[0] == "moss"]
    assert not late, f"{module_of(path)} imports {late} inside a function"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_heavy_libraries_stay_out_of_the_core(path: Path):
    """One careless import of transformers or sympy costs every command a second."""
    if layer(module_of(path)) in ("core", "engine", "entry"):
        heavy = [module for module, _ in imports(path) if module.split(".")[0] in HEAVY]
        assert not heavy, f"{module_of(path)} imports {heavy}"


def test_every_file_says_what_it_is():
    """A reader opens a file and has to learn in its first lines what it is for."""
    silent = [module_of(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent
