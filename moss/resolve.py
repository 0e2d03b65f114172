"""From what a user writes after `--model` to a model and its tokenizer that fit each other.

    model, tok = load()              # the bundled moss-nano, found through the package's data
    model, tok = load("out/nano")    # a folder: one that we trained, or any in the Hugging Face layout

Whatever is missing, broken or does not fit is a ValueError of one line that says which file and what to do.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch

from moss.model import Decoder
from moss.tokenizer import Tokenizer, require_markers
from moss.tokenizer import load as load_tokenizer
from moss.weights import load_model


def load(
    model: str | Path | None = None, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """The chat model in a folder (None: the bundled one) with its tokenizer.

    ValueError where there is no model, a file is broken, the tokenizer is another model's, or it lacks the markers of
    the chat format.
    """
    folder = locate(model)
    tok = load_tokenizer(folder)
    require_markers(tok)
    _check_sha(folder, tok)
    decoder = load_model(folder, dtype=dtype, device=device)
    if tok.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tok.vocab_size} ids but the model only {decoder.config.vocab_size}; "
            "this is another model's tokenizer.json, copy the one that belongs to the weights"
        )
    return decoder, tok


def locate(model: str | Path | None = None) -> Path:
    """The folder of a model; None is the bundled one."""
    if model is None:
        folder = Path(str(resources.files("moss"))) / "models" / "nano"
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"no model is bundled in {folder}; make one with `make nano` and give --model out/nano/sft"
            )
        return folder
    if "://" in str(model):
        raise ValueError(f"models on a server such as {model} are not part of this version; give a folder on this disk")
    folder = Path(model)
    if not folder.exists():
        raise ValueError(f"there is no model folder {str(model)!r}; give one with config.json, or none for the bundled")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds it")
    if not (folder / "config.json").is_file():
        steps = sorted(folder.glob("step-*/config.json"))
        hint = f"did you mean {steps[-1].parent}?" if steps else "a model folder holds config.json and its weights"
        raise ValueError(f"{folder} holds no config.json; {hint}")
    return folder


def _check_sha(folder: Path, tok: Tokenizer) -> None:
    """A model that we trained says which tokenizer it was trained with; another one would give nonsense."""
    path = folder / "moss.json"
    if not path.is_file():
        return
    try:
        expected = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_sha256")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken ({error}); copy the model again") from None
    if expected is not None and expected != tok.sha256:
        raise ValueError(
            f"{folder}: tokenizer.json is not the one this model was trained with (sha256 {tok.sha256[:12]}, "
            f"not {str(expected)[:12]}); copy the one that belongs to the weights"
        )
