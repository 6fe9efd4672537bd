"""What a system prompt has that only `str.format` would read, as templates for other libraries do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection

from fractal._log import level_of_caller

__all__ = ["warn_of_format"]

# A field with more than a name: `{price:.2f}`, `{who!r}`, `{user.name}`, `{rows[0]}`.
_FIELD = re.compile(r"\{(\w+)((?:\.\w+|\[[^\[\]{}]+\])*)(![rsa])?(?::((?:[^{}]|\{\w*\})*))?\}")
# Of prose and schemas, such as `{name: text}`, no specification is made.
_SPECIFICATION = re.compile(r"(?:.?[<>=^])?[-+ ]?z?#?0?\d*[,_]?(?:\.\d+)?[bcdeEfFgGnosxX%]?|.*(?:%[a-zA-Z]|\{\w*\}).*")


def warn_of_format(template: object, names: Collection[str]) -> None:
    """Warn of a template with fields that only `str.format` fills, which would reach the model unfilled.

    Args:
        template: A system prompt; only of text is there something to say.
        names: Placeholders that have values; without any the text is no template.
    """
    found = _only_for_format(template, names) if isinstance(template, str) and names else None
    if found is not None:
        warnings.warn(f"the system prompt has {found}", UserWarning, stacklevel=level_of_caller())


def _only_for_format(template: str, names: Collection[str]) -> str | None:
    if "{{" in template:
        return (
            "doubled braces, which reach the model doubled: str.format does not fill it. Write single ones: only"
            " {placeholders} that system_context names are filled, and other braces are left alone"
        )
    for field in _FIELD.finditer(template):
        name, way, conversion, specification = field.groups()
        is_format = way or conversion or (specification is not None and _SPECIFICATION.fullmatch(specification))
        if is_format and name in names:
            return f"{field[0]}, which reaches the model as it is: write {{{name}}}, and give its text"
    return None
