"""An agent as text for reading: its name, its model and what its tools take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fractal._json import encode, is_list
from fractal._texts import one_line

if TYPE_CHECKING:
    from fractal.toolkit import AgentToolkit, Tool

__all__ = ["card"]


def card(name: str, kind: str, model: str, toolkit: AgentToolkit) -> str:
    """The card of an agent, in some lines.

    Args:
        name: Its name.
        kind: Name of its class.
        model: Name of its model.
        toolkit: Its tools.
    """
    lines = [f"{name} ({kind})", f"  model: {model}", f"  tools: {len(toolkit) or 'none'}"]
    for tool in toolkit.tools.values():
        lines.append(f"    {_signature_line(tool)}")
        summary = tool.description.strip().partition("\n")[0]
        if summary:
            lines.append(f"        {summary}")
    return "\n".join(lines)


def _signature_line(tool: Tool) -> str:
    schema = tool.parameters.json_schema
    required = schema.get("required", ())
    parameters: list[str] = []
    for name, facts in schema["properties"].items():
        default = f" = {_json(facts['default'])}" if "default" in facts else "" if name in required else " = …"
        parameters.append(f"{name}: {_kind(facts, schema)}{default}")
    notes = {" → needs approval": tool.options.requires_approval, " → ends the run": tool.options.terminate}
    return f"{tool.name}({', '.join(parameters)})" + "".join(note for note, is_so in notes.items() if is_so)


def _kind(facts: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The type of a parameter in a few words, by its JSON Schema."""
    if "$ref" in facts:
        name = str(facts["$ref"]).rpartition("/")[2]
        found = schema.get("$defs", {}).get(name, {})
        return _kind(found, schema) if "enum" in found else name
    if "enum" in facts:
        return " | ".join(map(_json, facts["enum"]))
    if "const" in facts:
        return _json(facts["const"])
    choices = facts.get("anyOf") or facts.get("oneOf")
    if choices:
        return " | ".join(dict.fromkeys(_kind(choice, schema) for choice in choices))
    kind = facts.get("type", "any")
    return " | ".join(kind) if is_list(kind) else str(kind)


def _json(value: object) -> str:
    return one_line(encode(value).decode(), 40)
