"""Names that people look for in the package and do not find, and what to write instead."""

from __future__ import annotations

import opcode
import sys

__all__ = ["no_such_name"]

_RESULTS = ("AgentResult", "AgentReturnPart", "ToolResult", "ToolReturnPart")
_ELSEWHERE = {
    "fractal": {
        "Agent": "write `from fractal import BaseAgent`",
        "Runner": "an agent runs itself: `await agent.run(…)`, or `agent.run_sync(…)`",
        "function_tool": "write `from fractal import tool`",
        "Result": "write `from fractal import AgentResult`",
        "RunResult": "write `from fractal import AgentResult`",
        "Toolkit": "write `from fractal import AgentToolkit`",
    },
    "fractal.models": {name: f"it is no model: write `from fractal import {name}`" for name in _RESULTS},
}


def no_such_name(module: str, name: str) -> AttributeError | ImportError:
    """The error for a name that a module does not have.

    An import statement shows nothing of an `AttributeError`, so the hint is in an `ImportError` for it.

    Args:
        module: Name of the module.
        name: Name of the attribute.
    """
    hint = _ELSEWHERE.get(module, {}).get(name)
    if hint is None:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    asking = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]  # past the module's own `__getattr__`
    if asking.f_code.co_code[asking.f_lasti] == opcode.opmap["IMPORT_FROM"]:
        return ImportError(f"cannot import name {name!r} from {module!r}: {hint}", name=name)
    return AttributeError(f"module {module!r} has no attribute {name!r}: {hint}")
