"""The inference engine: token ids in, token ids out; it knows no text, no tools and no chat format."""

from moss.engine.engine import Engine, EngineError, Stream, Token
from moss.engine.sample import Sampling

__all__ = ["Engine", "EngineError", "Sampling", "Stream", "Token"]
