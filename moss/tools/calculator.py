"""The calculator: `Calculate("1.5*4")` for models, `calculate("1.5*4")` for people.

`arithmetic.py` has the grammar's meaning and its limits; it runs inside `sandbox.py`. `calculate_inline` is the same
arithmetic in this process, about 20 µs a call, for material and evaluation of our own.
"""

from __future__ import annotations

from moss.tools import sandbox
from moss.tools.arithmetic import evaluate
from moss.tools.base import ToolError, tool
from moss.tools.expression import ExpressionError

BOX = sandbox.Sandbox("moss.tools.arithmetic:evaluate")


@tool(key="calculator", switch="Calculator", api="Calculate", same_line=True, prepare=BOX.start)
def calculate(expression: str) -> str:
    """Compute an arithmetic expression, exactly for whole numbers.

    Args:
        expression: numbers, + - * / // % ^ !, parentheses, functions such as sqrt(2), and names set before: x=2;x^2
    """
    if sandbox.mode() == "inline":
        return calculate_inline(expression)
    return BOX.call(expression)


def calculate_inline(expression: str) -> str:
    """The same result without a process; it cannot hang, for every size is foretold before it is computed."""
    try:
        return evaluate(expression)
    except ExpressionError as error:
        raise ToolError(str(error)) from None
