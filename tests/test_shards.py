"""The reader of a folder's tensors; what it refuses is tested through `load_model` in test_weights.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moss.shards import Shards


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_was_read_takes_no_memory(name, tmp_path):
    """Prevents: a file of 31 GB that is mapped and stays in memory beside the weights made of it."""

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    tensors = {f"part{i}": torch.ones(4 * 2**20) for i in range(4)}  # 16 MiB each
    (save_file if name.endswith("tensors") else torch.save)(tensors, tmp_path / name)
    shards = Shards(tmp_path)
    before = mapped()
    kept = shards.read("part3")
    assert kept.sum() == kept.numel()
    assert mapped() - before > 12 * 2**20  # it is the file that is read, and no copy
    for part in tensors:
        assert shards.read(part).sum() == kept.numel()
    assert mapped() - before < 24 * 2**20
