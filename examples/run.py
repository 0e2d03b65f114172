"""Run a notebook of this folder as a reader would, from its first cell on, offline, and keep its outputs.

    python -m examples.run examples/talk.ipynb     # writes the new outputs into the file

The tests call `execute`. It needs nbclient and ipykernel, which `make test` installs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from moss.files import replacing

ROOT = Path(__file__).parent.parent
SECONDS = 900  # for one cell; the first may build the kernels, on a busy machine

# Runs in the notebook's process before its cells: nothing but this machine can be reached.
OFFLINE = """
import socket

connect = socket.socket.connect


def stay_here(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a notebook of examples/ reached for {address}")
    return connect(self, address)


socket.socket.connect = stay_here
"""


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a new run in `folder`, without what the program says about itself.

    CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        startup_timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as home:
        startup = Path(home) / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "offline.py").write_text(OFFLINE, encoding="utf-8")
        client.execute(env={**os.environ, "IPYTHONDIR": home, "PYTHONPATH": str(ROOT)})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Messages such as that the kernels are being built come on stderr, or shown by rich as display data.
            cell.outputs = [
                out for out in cell.outputs if out.output_type != "display_data" and out.get("name") != "stderr"
            ]
    notebook.metadata.language_info = {"name": "python"}  # the version is that of whoever ran it last
    return notebook


def main(argv: list[str]) -> int:
    for name in argv:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(Path(name), Path(folder))
        with replacing(Path(name)) as beside:
            nbformat.write(notebook, beside)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
