"""MOSS: a bilingual conversational language model that uses tools, and the whole road to it.

The names below are the public ones; each is imported when it is first used, so that `import moss` costs nothing.

    import moss

    chat = moss.load()
    for event in chat.stream("What is 37*12?"):
        print(event)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Dialog": "moss.chat",
    "Round": "moss.chat",
    "Turn": "moss.chat",
    "parse": "moss.chat",
    "render": "moss.chat",
    "Tokenizer": "moss.tokenizer",
    "Decoder": "moss.model",
    "ModelConfig": "moss.model",
    "load_model": "moss.weights",
    "save_model": "moss.weights",
    "Answer": "moss.session",
    "Chat": "moss.session",
    "load": "moss.session",
    "Engine": "moss.engine",
    "RELEASED": "moss.engine",
    "Sampling": "moss.engine",
    "answer": "moss.tools.chat_server",
    "Source": "moss.tools.base",
    "ToolError": "moss.tools.base",
    "progress": "moss.tools.base",
    "standard_tools": "moss.tools.base",
    "load_tools": "moss.tools.own",
    "tool": "moss.tools.base",
    **dict.fromkeys(
        ("Event", "Thoughts", "Command", "ToolStarted", "ToolProgress", "ToolDone", "Reply", "Notice", "Error", "Done"),
        "moss.tools.events",
    ),
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moss' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
