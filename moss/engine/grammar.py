"""What the model may write next, as a mask over token ids: a pass of a turn in the chat format, and nothing else.

Between `<|Commands|>` and `<eoc>` only `None` or well-formed calls of the given tools are possible, with as many
arguments as each takes; thoughts and reply are free text, in which no control id stands but their own end. The ids
that open a section are those that `render` writes. A call may be written in every way in which `parse_commands` reads
it without complaint, odd blanks and quotes included; what stands around calls is narrow, so that a model that wanted
to add something there ends the line.

    grammar = commands_grammar(tok, {"calculator": calculate}, "thoughts")
    state = grammar.start()  # for each request
    logits[~state.mask()] = -inf; state.advance(id)  # at each step

A pass is a small graph over ids, made once per tokenizer and tool set. Its masks are constants, but for the line of
commands: llguidance works those out from one regular expression and remembers them for all requests.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from moss.chat import Form, Until
from moss.tokenizer import Tokenizer

INSTALLED = find_spec("llguidance") is not None  # where not, a grammar says so when it is asked for
if TYPE_CHECKING or INSTALLED:
    import llguidance

NO_LIBRARY = "keeping the model to its tools needs llguidance; install it: pip install llguidance"


class ToolLike(Protocol):
    """What a grammar needs to know of a tool."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]: ...


# ----------------------------------------------------------------------------------------- a line of commands

# The pieces of `parse_commands` as regular expressions (Rust's dialect, in which `\s` is not quite Python's).
_BLANKS = r"\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_S = f"[{_BLANKS}]*"
_ESCAPE = r"\\+[^\\]"  # a backslash takes the quote after it into the argument
_QUOTES = f'(?:"{_S})+'
_PLAIN = rf'(?:[^"\\]|{_ESCAPE})*'  # an argument in which every quote is escaped
# The only argument of a call may hold bare quotes, each with something behind it that does not close the argument.
_LOOSE = rf'(?:[^"\\]|{_ESCAPE}|{_QUOTES}(?:[^"\\),{_BLANKS}]|{_ESCAPE}|,{_S}(?:[^"\\{_BLANKS}]|{_ESCAPE})))*'
_BETWEEN = r" ?(?:[,;，；、][ \n]?|\n)"
_BEGIN = r"[ \n]?"
_NAME = re.compile(r"[A-Z][A-Za-z0-9]*")


@dataclass(frozen=True, order=True)
class _Signature:
    """A tool's name and how many arguments it takes, `most` -1 for any number."""

    name: str
    least: int
    most: int


def _signature(tool: ToolLike) -> _Signature:
    """How often `tool` can be given text; ValueError where no line of commands can call it."""
    if not _NAME.fullmatch(tool.name):
        raise ValueError(
            f"no line of commands can call {tool.name!r}; a name is a capital letter, then letters, digits"
        )
    every = list(tool.parameters.values())
    places = [each for each in every if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    any_number = any(each.kind == each.VAR_POSITIONAL for each in every)
    unreachable = any(each.kind == each.KEYWORD_ONLY and each.default is each.empty for each in every)
    if unreachable or not (places or any_number):
        raise ValueError(f"no line of commands can call {tool.name}; give it arguments that stand one after the other")
    least = sum(each.default is each.empty for each in places)
    return _Signature(tool.name, max(least, 1), -1 if any_number else len(places))


def _call(signature: _Signature) -> str:
    """One call as a regular expression."""
    forms = []
    if signature.least == 1:
        forms.append(rf'"{_LOOSE}{_QUOTES}\)')
    if signature.most != 1:
        least = max(signature.least, 2) - 1
        most = "" if signature.most < 0 else signature.most - 1
        forms.append(rf'"{_PLAIN}"(?:{_S},{_S}"{_PLAIN}"){{{least},{most}}}{_S}\)')
    return rf"{signature.name}[ \t]*\({_S}(?:{'|'.join(forms)})"


def _line(signatures: Sequence[_Signature], max_calls: int | None) -> str:
    """A whole line of commands as a regular expression."""
    lines = ["None"]
    if signatures:
        call = f"(?:{'|'.join(map(_call, signatures))})"
        lines.append(f"{call}(?:{_BETWEEN}{call}){{0,{'' if max_calls is None else max_calls - 1}}}")
    return f"{_BEGIN}(?:{'|'.join(lines)})"


# ------------------------------------------------------------------------------------------------ a pass of a turn


@dataclass(eq=False)
class _Node:
    """A place in a pass: which ids may come, and where each leads. Other allowed ids, all of them in `text`, stay here.

    mask: (V,) bool, shared and never changed; of a line of commands it is empty, and `line` makes the masks.
    """

    mask: Tensor
    edges: dict[int, _Node] = field(default_factory=dict)
    text: frozenset[int] = frozenset()
    line: llguidance.LLMatcher | None = None


@dataclass(frozen=True, eq=False)
class PassGrammar:
    """The grammar of one pass, shared by all requests that need it; `start` for each."""

    _first: _Node

    def start(self) -> State:
        return State(self._first)


class State:
    """Where one request stands in its pass."""

    def __init__(self, node: _Node) -> None:
        self._enter(node)

    def _enter(self, node: _Node) -> None:
        self._node = node
        self._line = None if node.line is None else node.line.deep_copy()

    def mask(self) -> Tensor:
        """The ids that may come next, one at least: (V,) bool on the CPU, V as in the tokenizer. Not to be changed."""
        if self._line is None:
            return self._node.mask
        return torch.from_numpy(np.frombuffer(self._line.compute_logit_bias(), dtype=np.uint8) != 0)

    def advance(self, id: int) -> None:
        """Take the id that was chosen. ValueError where it cannot come; the state is then as before.

        Within a line it takes every id whose text fits; where one text alone can follow, the mask has its longest id.
        """
        node = self._node
        following = node.edges.get(id)
        if self._line is not None:
            if following is not None and self._line.is_accepting():
                self._enter(following)
            elif id not in node.text or self._line.try_consume_tokens([id]) == 0:
                raise ValueError(f"id {id} cannot come next in a line of commands; sample under the mask")
        elif following is not None:
            self._enter(following)
        elif id not in node.text:
            raise ValueError(f"id {id} cannot come next in this pass; sample under the mask")


class _Vocabulary:
    """A tokenizer's ids as nodes of passes; also what llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok
        self.tokens = [tok.decode_bytes([id], markers=True) for id in range(tok.vocab_size)]  # holes are empty
        self.special_token_ids = sorted(tok.control_ids)
        self.ordinary = frozenset(id for id, data in enumerate(self.tokens) if data) - tok.control_ids

    def __call__(self, text: str) -> list[int]:
        return self.tok.encode(text)

    @cached_property
    def free(self) -> Tensor:
        """The mask of all ordinary ids."""
        return self.only(self.ordinary)

    @cached_property
    def eos_token_id(self) -> int:
        """To llguidance the end of all is the end of the line of commands."""
        return self.tok.marker("<eoc>")[0]

    @cached_property
    def for_lines(self) -> llguidance.LLTokenizer:
        if not INSTALLED:
            raise ValueError(NO_LIBRARY)
        # Its slices speed up masks that are not known yet; each is made once here, and making slices takes longer.
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(self), slices=[])

    def only(self, ids: Iterable[int]) -> Tensor:
        """The mask (V,) of exactly these ids."""
        mask = torch.zeros(self.tok.vocab_size, dtype=torch.bool)
        mask[list(ids)] = True
        return mask

    def fixed(self, ids: Sequence[int], following: _Node) -> _Node:
        """These ids, one after the other."""
        for id in reversed(ids):
            following = _Node(self.only([id]), {id: following})
        return following

    def over(self, end: int) -> _Node:
        """Nothing follows; who asks for more gets the end again."""
        node = _Node(self.only([end]))
        node.edges[end] = node
        return node

    def text(self, end: int, following: _Node) -> _Node:
        """Free text up to `end`."""
        mask = self.free.clone()
        mask[end] = True
        return _Node(mask, {end: following}, self.ordinary)

    def line(self, pattern: str, following: _Node) -> _Node:
        """A line of commands up to `<eoc>`."""
        tokens = self.for_lines
        matcher = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_regex(pattern))
        if matcher.is_error():
            raise ValueError(f"the commands of these tools make no grammar: {matcher.get_error()}")
        return _Node(torch.empty(0, dtype=torch.bool), {self.eos_token_id: following}, self.ordinary, matcher)


_vocabulary = lru_cache(maxsize=4)(_Vocabulary)


def commands_grammar(
    tok: Tokenizer,
    tools: Mapping[str, ToolLike],
    until: Until = "thoughts",
    *,
    form: Form = "plugin",
    tagged: bool = False,
    max_calls: int | None = None,
) -> PassGrammar:
    """What a model may write after a prompt that was cut at `until`, if exactly `tools` are switched on.

    until: as in `render`; after `results` either thoughts or the reply may come, where the vocabulary has ids for
    roles. form: as in `render`. tagged: the reply opens with a quality tag, which code writes, so that the choice of
    the reply ends the pass. max_calls: how many calls a line may hold.
    ValueError where a tool cannot be called in a line of commands, or llguidance is missing.
    """
    signatures = tuple(sorted({_signature(tool) for tool in tools.values()}))
    return _grammar(tok, signatures, until, form, tagged and until == "results", max_calls)


@lru_cache(maxsize=32)
def _grammar(
    tok: Tokenizer,
    signatures: tuple[_Signature, ...],
    until: Until,
    form: Form,
    tagged: bool,
    max_calls: int | None,
) -> PassGrammar:
    vocabulary = _vocabulary(tok)
    end = tok.eos if form == "base" else tok.marker("<eom>")[0]
    reply = vocabulary.text(end, vocabulary.over(end))
    if until == "reply" or form != "plugin":
        return PassGrammar(reply)
    if until == "thoughts":
        line = vocabulary.line(_line(signatures, max_calls), vocabulary.over(tok.marker("<eoc>")[0]))
        opening = [*tok.encode_again("\n"), *tok.opening("<|Commands|>")]
        return PassGrammar(vocabulary.text(tok.marker("<eot>")[0], vocabulary.fixed(opening, line)))
    if not tok.single_roles:
        raise ValueError(f"{tok.origin} has no ids for roles, so nothing can be chosen after results; ask for a reply")
    (think, *think_rest), (say, *say_rest) = tok.opening("<|Inner Thoughts|>"), tok.opening("<|MOSS|>")
    thoughts = _grammar(tok, signatures, "thoughts", form, False, max_calls)
    choices = {
        think: vocabulary.fixed(think_rest, thoughts._first),
        say: vocabulary.over(say) if tagged else vocabulary.fixed(say_rest, reply),
    }
    return PassGrammar(_Node(vocabulary.only(choices), choices))
