"""The equation solver: `Solve("x+y=35;2x+4y=94")` for models, `solve(…)` for people.

`equations.py` reads and bounds the text, `algebra.py` solves; both run inside `sandbox.py`, and SymPy is loaded there
and nowhere else. `solve_inline` runs the same code in this process: for equations of our own making only, since
nothing there ends an elimination that takes for ever.
"""

from __future__ import annotations

import importlib

from moss.tools import sandbox
from moss.tools.base import ToolError, tool
from moss.tools.expression import ExpressionError

BOX = sandbox.Sandbox("moss.tools.algebra:solve_text", packages=("sympy", "mpmath"))


@tool(key="solver", switch="Equation solver", api="Solve", prepare=BOX.start)
def solve(equation: str, unknown: str = "") -> str:
    """Solve an equation or a system of equations.

    Exact where that is short, else `x ≈ 1.23`. Of equations with sin, cos or tan of the unknown, the solutions in the
    first period from 0 on; with other functions of it, the real ones; of polynomials, the complex ones too.

    Args:
        equation: equations kept apart by semicolons, for example x+y=35;2x+4y=94
        unknown: which unknown is wanted, where the equations do not settle all of them
    """
    if sandbox.mode() == "inline":
        raise ToolError("Solve needs its sandbox; MOSS_SANDBOX=inline is for the calculator alone")
    return BOX.call(equation, unknown)


def solve_inline(equation: str, unknown: str = "") -> str:
    """The same result in this process (imports SymPy); only for equations that are known to be easy."""
    algebra = importlib.import_module("moss.tools.algebra")  # half a second that `import moss.tools` must not cost
    try:
        return algebra.solve_text(equation, unknown)
    except ExpressionError as error:
        raise ToolError(str(error)) from None
