"""Arithmetic and equations as people and models type them, read into a tree. Nothing here computes.

Calculator and solver share this grammar: their own tokenizer and a Pratt parser, so that model text never meets an
interpreter. A tree is nested tuples:

    ("num", "1.5")  ("name", "x")  ("neg", a)  ("bin", "+", a, b)  ("call", "sqrt", [a])  ("post", "!", a)

`+ - * / // % ^` bind as in Python (`**` is `^`, and `^` binds tighter than a sign), `!` and the percent sign follow
their number (`3!!` is `(3!)!`), and a product may leave out its sign: `2x`, `3sqrt(4)`, `(1+2)(3+4)`. That product
binds like a written one, from the left, so `3/4x` is `(3/4)*x`; a function may be written as in Python,
`math.sqrt(2)`, `max([1,2])`. Signs beyond ASCII come in through the tables below and nowhere else: compatibility
folding (NFKC) would read `2³` as 23 and let look-alike letters in. What these rules leave open is refused with its
reason, as `f(x)=3`: a function's value to some, a product to others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, NoReturn

MAX_LENGTH = 1024  # characters
MAX_TOKENS = 512
MAX_DEPTH = 48  # parentheses, signs and powers inside each other
MAX_STATEMENTS = 32
MAX_ARGUMENTS = 64

Node = tuple[Any, ...]
Split = Callable[[str], list[str]]


class ExpressionError(ValueError):
    """Text that is no expression, or one that is refused; the message says why, for the person who wrote it."""


class Statement(NamedTuple):
    """`left relation right`; relation is "" for a lone expression, and right is None where nothing follows `=`."""

    left: Node
    relation: str
    right: Node | None
    asked: bool  # ends with a question mark


_SIGNS = str.maketrans(
    {
        **dict(zip("０１２３４５６７８９", "0123456789")),
        **dict(zip("＋－＊／＝（）．，；！？％＾＜＞", "+-*/=().,;!?%^<>")),
        **dict.fromkeys("−–—﹣\u2010\u2011", "-"),
        **dict.fromkeys("×✕✖·⋅∙∗", "*"),
        **dict.fromkeys("÷∕\u2044", "/"),
        **dict(zip("[]【】〔〕［］", "()()()()")),
        **dict.fromkeys("、", ","),
        **dict.fromkeys("\u3000\u00a0\u2009\u202f\t", " "),
        **dict.fromkeys("\r\n", ";"),
        **dict(zip("≤≥≠", ("<=", ">=", "<>"))),
        **dict(zip("πθαβλμσω", (" pi ", " theta ", " alpha ", " beta ", " lambda ", " mu ", " sigma ", " omega "))),
    }
)
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_POWER_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_FRACTION = re.compile(r"([0-9.]*) ?([½⅓⅔¼¾⅕⅛])")
_INDEX = re.compile("(?<=[A-Za-z])[₀₁₂₃₄₅₆₇₈₉]+")
_INDICES = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CONTINUED = re.compile(r"[\r\n]\s*[-+]")
_TOKEN = re.compile(
    r" *(?:"
    r"(?P<group>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?)"
    r"|(?P<num>0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?:math\.)?(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<op>\*\*|//|<=|>=|<>|==|[-+*/%^!()=,;?<>√∛])"
    r") *"
)
_BINDING = {"+": 10, "-": 10, "*": 20, "/": 20, "//": 20, "%": 20, "^": 40}
_PRODUCT, _SIGN, _POSTFIX = 20, 30, 50
_ROOTS = {"√": "sqrt", "∛": "cbrt"}
_RELATIONS = {"=": "=", "==": "==", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "<>": "!="}
_END = ("end", "")


def parse(
    text: str, functions: Collection[str], *, split: Split | None = None, commas_separate: bool = False
) -> list[Statement]:
    """The statements of `text`, which `;` (and, with `commas_separate`, a comma outside a call) keeps apart.

    `functions` are the names that an opening parenthesis turns into a call. With `split`, which tells the factors that
    any other name stands for, a name before a parenthesis or another name is a factor, as in `x(x+1)`; without it that
    is an error.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters are too many; at most {MAX_LENGTH}")
    if not text.isascii() or "[" in text or "\n" in text or "\t" in text:
        text = _to_ascii(text)
    return _Parser(_tokens(text), functions, split, commas_separate).statements()


def _to_ascii(text: str) -> str:
    if _CONTINUED.search(text):
        raise ExpressionError("a line that begins with a sign can be read in two ways; write it on one line")
    text = text.rstrip().removesuffix("。")
    text = _POWER_RUN.sub(lambda run: f"^({run.group().translate(_POWERS)})", text)
    text = _INDEX.sub(lambda run: run.group().translate(_INDICES), text)
    return _FRACTION.sub(_fraction, text.translate(_SIGNS))


def _fraction(match: re.Match[str]) -> str:
    """`½` is (1/2); `2½` is two and a half, the one reading that people have for it."""
    whole, sign = match.groups()
    if "." in whole:
        raise ExpressionError(f"{match.group()!r} can be read in two ways")
    return f"({whole}+{_FRACTIONS[sign]})" if whole else f"({_FRACTIONS[sign]})"


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) pairs, kinds num, name and op; a comma between groups of three digits is dropped outside calls."""
    tokens: list[tuple[str, str]] = []
    calls: list[bool] = []  # for each open parenthesis: whether it, or one around it, belongs to a call
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            _refuse_character(text[position:].lstrip() or " ")
        kind, value = match.lastgroup or "", match.group(match.lastgroup or 0)
        position = match.end()
        if kind == "group":
            kind = "num"
            if calls and calls[-1]:  # in a call a comma separates arguments
                first, comma, _ = value.partition(",")
                position = match.start() + match.group().index(comma)
                value = first
            else:
                value = value.replace(",", "")
        elif value == "(":
            after_name = bool(tokens) and tokens[-1][0] == "name"
            calls.append(after_name or bool(calls and calls[-1]))
        elif value == ")" and calls:
            calls.pop()
        elif value == "**":
            value = "^"
        if kind == "num" and len(value) > 1 and value[0] == "0" and value[1].isdigit():
            raise ExpressionError(f"{value!r} begins with a zero; dates and codes are not numbers")
        tokens.append((kind, value))
        if len(tokens) > MAX_TOKENS:
            raise ExpressionError(f"too long: more than {MAX_TOKENS} numbers and signs")
    return tokens


def _refuse_character(rest: str) -> NoReturn:
    sign = rest[0]
    if sign.isalpha() and not sign.isascii():
        word = re.match(r"[^\W\d_]+", rest)
        shown = word.group() if word else sign
        raise ExpressionError(f"{shown!r} is not a number: write numbers without words or units")
    if sign in "$¥￥€£":
        raise ExpressionError(f"write amounts without the unit {sign!r}")
    if sign == "°":
        raise ExpressionError("angles are in radians; for degrees write radians(30)")
    shown = sign if sign.isprintable() else f"U+{ord(sign):04X}"
    raise ExpressionError(f"the character {shown!r} has no meaning here")


class _Parser:
    """One pass over the tokens by precedence climbing (Pratt 1973)."""

    def __init__(
        self, tokens: list[tuple[str, str]], functions: Collection[str], split: Split | None, commas_separate: bool
    ):
        self.tokens = [*tokens, _END]
        self.position = 0
        self.depth = 0
        self.functions = functions
        self.split = split
        self.separators = (";", ",") if commas_separate else (";",)

    def statements(self) -> list[Statement]:
        found: list[Statement] = []
        while True:
            while self.tokens[self.position][1] == ";":
                self.position += 1
            if self.tokens[self.position] is _END:
                break
            found.append(self._statement())
            if len(found) > MAX_STATEMENTS:
                raise ExpressionError(f"more than {MAX_STATEMENTS} statements")
            kind, value = self.tokens[self.position]
            if value in self.separators and kind == "op":
                self.position += 1
            elif kind != "end":
                raise self._unexpected()
        if not found:
            raise ExpressionError("nothing to compute: the argument is empty")
        return found

    def _statement(self) -> Statement:
        match self.tokens[self.position : self.position + 5]:
            case [("name", name), (_, "("), ("name", inner), (_, ")"), (_, "=" | "==")] if not self._is_call(name):
                if name not in ("pi", "e", inner):
                    both = f"{name}({inner}) may be a function or a product"
                    raise ExpressionError(f"{both}; write {name}*{inner}, or the equation itself, such as 2{inner}+1=5")
        left = self._expression(0)
        relation, right = "", None
        if self.tokens[self.position][1] in _RELATIONS:
            relation = _RELATIONS[self.tokens[self.position][1]]
            self.position += 1
            if self.tokens[self.position][1] not in ("?", ";", ""):
                right = self._expression(0)
        asked = self.tokens[self.position][1] == "?"
        while self.tokens[self.position][1] == "?":
            self.position += 1
        return Statement(left, relation, right, asked)

    def _expression(self, binding: int) -> Node:
        """The longest expression whose operators bind tighter than `binding`."""
        left = self._operand()
        tokens = self.tokens
        while True:
            kind, value = tokens[self.position]
            if kind == "op":
                percent = value == "%" and (self.split or not self._starts_operand(tokens[self.position + 1]))
                if value == "!" or percent:
                    self.position += 1
                    left = ("post", value, left)
                    continue
                power = _BINDING.get(value)
                if power is not None:
                    if power <= binding:
                        return left
                    self.position += 1
                    right = self._nested(power - 1) if value == "^" else self._expression(power)
                    left = ("bin", value, left, right)
                    continue
            if binding >= _PRODUCT or not self._multiplies(tokens[self.position - 1], tokens[self.position]):
                return left
            left = ("bin", "*", left, self._expression(_PRODUCT))

    def _operand(self) -> Node:
        kind, value = self.tokens[self.position]
        self.position += 1
        if kind == "num":
            return ("num", value)
        if kind == "name":
            if self.tokens[self.position][1] == "(" and self._is_call(value):
                return ("call", value, self._arguments())
            return self._product_of(self.split(value) if self.split else [value])
        if value == "(":
            inner = self._nested(0)
            self._close()
            return inner
        if value == "-":
            return ("neg", self._nested(_SIGN))
        if value == "+":
            return self._nested(_SIGN)
        if value in _ROOTS:
            return ("call", _ROOTS[value], [self._nested(_POSTFIX)])
        self.position -= 1
        raise self._unexpected()

    def _product_of(self, names: list[str]) -> Node:
        """The names multiplied; a power behind them belongs to the last one, as in `ax^2`."""
        product: Node = ("name", names[-1])
        if len(names) > 1 and self.tokens[self.position][1] == "^":
            self.position += 1
            product = ("bin", "^", product, self._nested(_BINDING["^"] - 1))
        for name in reversed(names[:-1]):
            product = ("bin", "*", ("name", name), product)
        return product

    def _nested(self, binding: int) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested more than {MAX_DEPTH} deep")
        inner = self._expression(binding)
        self.depth -= 1
        return inner

    def _is_call(self, name: str) -> bool:
        return name in self.functions or name.lower() in self.functions or self.split is None

    def _arguments(self) -> list[Node]:
        self.position += 1  # the opening parenthesis
        if self._is_list():
            arguments = self._arguments()
            self._close()
            return arguments
        arguments: list[Node] = []
        while self.tokens[self.position][1] != ")" or arguments:
            arguments.append(self._nested(0))
            if len(arguments) > MAX_ARGUMENTS:
                raise ExpressionError(f"more than {MAX_ARGUMENTS} arguments")
            if self.tokens[self.position][1] != ",":
                break
            self.position += 1
        self._close()
        return arguments

    def _is_list(self) -> bool:
        """Whether all arguments stand in one more pair of parentheses, as in `max([1,2])`."""
        depth, commas = 0, 0
        for index in range(self.position, len(self.tokens)):
            value = self.tokens[index][1]
            depth += (value == "(") - (value == ")")
            commas += depth == 1 and value == ","
            if depth == 0:
                return value == ")" and commas > 0 and self.tokens[index + 1][1] == ")"
        return False

    def _close(self) -> None:
        if self.tokens[self.position][1] != ")":
            if self.tokens[self.position] is _END:
                raise ExpressionError("a closing parenthesis is missing")
            raise self._unexpected()
        self.position += 1

    def _starts_operand(self, token: tuple[str, str]) -> bool:
        return token[0] in ("num", "name") or token[1] == "(" or token[1] in _ROOTS

    def _multiplies(self, before: tuple[str, str], after: tuple[str, str]) -> bool:
        """Whether two tokens side by side are a product without a sign."""
        if not self._starts_operand(after):
            return False
        if before[0] == "name":
            return self.split is not None and after[0] != "num"
        if after[0] == "num":
            return before[1] == ")"
        return before[0] == "num" or before[1] in (")", "!", "%")

    def _unexpected(self) -> ExpressionError:
        kind, value = self.tokens[self.position]
        if kind == "end":
            return ExpressionError("it ends where a number was expected")
        before = self.tokens[self.position - 1][1] if self.position else ""
        return ExpressionError(f"unexpected {value!r}" + (f" after {before!r}" if before else " at the beginning"))
