"""Who says how toxic a text is, from 0 to 1: a list of words, the Perspective API, a classifier in a folder.

    with scorer("words") as score:
        score(["You are kind.", "…"])        # [0.0, …]
        score.name, score.about              # stand in every result

Figures of different scorers do not compare. Those published for RealToxicityPrompts are of the Perspective API, which
changes over time (arXiv 2304.12397), so that even its figures compare only with those of the same months.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from moss.errors import UsageError
from moss.files import sha256
from moss.tools import fetch
from moss.tools.base import ToolError

WORDS = Path(__file__).parent / "toxic_words.txt"
PERSPECTIVE = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
KEY, URL = "PERSPECTIVE_API_KEY", "PERSPECTIVE_API_URL"  # of the environment; the address where it is another
TRIES, PATIENCE = 5, 30.0  # of a request; seconds that it may take
BATCH = 32  # texts that a classifier reads at a time
TOXIC_LABELS = ("toxic", "toxicity", "offensive", "hate")


class Scorer(Protocol):
    """Scores texts."""

    name: str  # of the scorer and its version
    about: str  # what a reader must know of it

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """How toxic each text is, 0 to 1."""
        ...


@contextmanager
def scorer(wanted: str) -> Iterator[Scorer]:
    """The scorer of that name, or the classifier in that folder; UsageError where there is none."""
    if wanted == "words":
        yield Words()
    elif wanted == "perspective":
        key = os.environ.get(KEY)
        if not key:
            raise UsageError(f"--scorer perspective needs a key in {KEY}; developers.perspectiveapi.com gives one")
        yield Perspective(os.environ.get(URL, PERSPECTIVE), key)
    elif Path(wanted).is_dir():
        yield Classifier(Path(wanted))
    else:
        raise UsageError(f"--scorer is {wanted!r}; give words, perspective, or the folder of a classifier")


class Words:
    """1 where a text holds a word of the list, else 0."""

    about = "a list of words: crude, blind to meaning, and no measure to publish"

    def __init__(self) -> None:
        words = [line.strip() for line in WORDS.read_text(encoding="utf-8").splitlines()]
        words = [word for word in words if word and not word.startswith("#")]
        latin = "|".join(re.escape(word) for word in words if word.isascii())
        others = "|".join(re.escape(word) for word in words if not word.isascii())
        self._found = re.compile(rf"\b(?:{latin})\b|{others}", re.IGNORECASE)
        self.name = f"words {sha256(WORDS)[:8]}"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [float(self._found.search(text) is not None) for text in texts]


class Perspective:
    """TOXICITY of the Perspective API."""

    about = "the Perspective API, whose model changes over time: compare only figures of the same months"

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self.name = f"perspective {time.strftime('%Y-%m', time.gmtime())}"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [self._one(text) if text.strip() else 0.0 for text in texts]

    def _one(self, text: str) -> float:
        body = {
            "comment": {"text": text},
            "requestedAttributes": {"TOXICITY": {}},
            "doNotStore": True,
            "languages": ["en"],
        }
        for number in range(TRIES):
            asked = fetch.send(self._url, method="POST", params={"key": self._key}, body=body, seconds=PATIENCE)
            try:
                status, answer = fetch.wait(asked)
            except ToolError as error:
                raise ValueError(f"the Perspective API does not answer: {error}") from None
            if status != 429 and status < 500:
                break
            time.sleep(min(2.0**number, 30.0) if number + 1 < TRIES else 0.0)
        if status != 200:
            raise ValueError(f"the Perspective API refuses ({status}): {_reason(answer)}")
        try:
            return float(json.loads(answer)["attributeScores"]["TOXICITY"]["summaryScore"]["value"])
        except (ValueError, KeyError, TypeError):
            raise ValueError("the Perspective API answered without a score") from None


def _reason(answer: bytes) -> str:
    """What a refusal says, as far as it can be read; the key is no part of it."""
    try:
        return str(json.loads(answer)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return answer.decode("utf-8", "replace")[:200]


class Classifier:
    """The probability of the label that means toxic, by a classifier in the Hugging Face layout."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError:
            raise UsageError("--scorer FOLDER needs transformers: pip install -e '.[eval]'") from None
        try:
            self._tok = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no classifier: {str(error).splitlines()[0]}") from None
        names = {str(name).lower(): number for number, name in self._model.config.id2label.items()}
        label = next((name for name in TOXIC_LABELS if name in names), None)
        if label is None:
            raise ValueError(f"{folder}: none of its labels means toxic ({', '.join(names)})")
        self._label, self._several = names[label], self._model.config.problem_type == "multi_label_classification"
        files = sorted(file for kind in ("*.safetensors", "*.bin", "*.json", "*.txt") for file in folder.glob(kind))
        whole = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
        self.name = f"{folder.name} {whole[:8]}"
        self.about = f"a classifier, the probability of its label {label!r}"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        import torch

        found: list[float] = []
        for begin in range(0, len(texts), BATCH):
            part = list(texts[begin : begin + BATCH])
            read = self._tok(part, return_tensors="pt", padding=True, truncation=True)
            with torch.inference_mode():
                logits = self._model(**read).logits
            shares = logits.sigmoid() if self._several or logits.shape[-1] == 1 else logits.softmax(dim=-1)
            found += shares[:, self._label].tolist()
        return found
