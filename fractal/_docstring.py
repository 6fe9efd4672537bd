"""What a docstring says of a function and its parameters: Google, NumPy or Sphinx style."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Documentation", "ParameterText", "read_docstring"]

# Whatever griffe cannot read is left out; a warning for each in a user's log would help nobody.
_QUIET: Any = {style: {"warnings": False} for style in ("google", "numpy", "sphinx")}
_HAS_SECTION = re.compile(r"^\s*(:\w+|\w[\w ]*:\s*$|-{3,}\s*$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ParameterText:
    """What is said of one parameter: its description, and its type if that is written there."""

    description: str | None = None
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Documentation:
    """A docstring, taken apart: the text before the first section, and the parameters by name."""

    summary: str = ""
    parameters: dict[str, ParameterText] = field(default_factory=dict[str, ParameterText])


def read_docstring(docstring: str | None) -> Documentation:
    """Take a docstring apart; what cannot be read is left out, never an error."""
    text = inspect.cleandoc(docstring or "")
    if not _HAS_SECTION.search(text):
        return Documentation(text)
    # Imported late: it costs more than all the rest of the package, and many tools have a one-line docstring.
    import griffe

    summary: list[str] = []
    parameters: dict[str, ParameterText] = {}
    for section in griffe.Docstring(text).parse("auto", per_style_options=_QUIET):
        if isinstance(section, griffe.DocstringSectionText):
            summary.append(section.value)
        elif isinstance(section, griffe.DocstringSectionParameters):
            for parameter in section.value:
                name = parameter.name.lstrip("*")
                description = " ".join(parameter.description.split())
                kind = str(parameter.annotation) if parameter.annotation is not None else None
                parameters[name] = ParameterText(description or None, kind)
    return Documentation("\n\n".join(summary).strip(), parameters)
