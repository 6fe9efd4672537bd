"""An agent as text for reading: its name, its model and what its tools take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractal.toolkit import AgentToolkit, Tool

__all__ = ["card"]


def card(name: str, kind: str, model: str, toolkit: AgentToolkit) -> str:
    """The agent in some lines.

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
        kind = facts.get("type", "any")
        parameters.append(f"{name}: {kind}" + ("" if name in required else " = …"))
    notes = {" → needs approval": tool.options.requires_approval, " → ends the run": tool.options.terminate}
    return f"{tool.name}({', '.join(parameters)})" + "".join(note for note, is_so in notes.items() if is_so)
