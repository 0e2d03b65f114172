"""The inference engine: token ids in, token ids out; it knows no text, no tools and no chat format."""

from moss.engine.engine import Engine
from moss.engine.requests import EngineError, Grammar, QueueFull, Stream, Token
from moss.engine.sample import RELEASED, Sampling

__all__ = ["RELEASED", "Engine", "EngineError", "Grammar", "QueueFull", "Sampling", "Stream", "Token"]
