"""A coordinator and two specialists that work in parallel, on one budget, watched while they do.

python examples/multiagent_example.py
"""

import asyncio
import json

from _offline import Turn, endpoint

from fractal import (
    AgentResult,
    BaseAgent,
    DelegationStarted,
    Event,
    Limits,
    ModelRequested,
    RunFinished,
    RunStarted,
    ToolFinished,
    tool,
)
from fractal.testing.answers import AnswerLike, call


@tool
async def opening_hours(museum: str) -> str:
    """Look up when a museum is open.

    Args:
        museum: Its name.
    """
    await asyncio.sleep(0.1)
    return f"{museum}: 9:00 to 19:00"


def watch(event: Event) -> None:
    """Print the tree of runs while it grows. An observer given to the first agent sees the runs below it too."""
    match event:
        case RunStarted():
            what = f"{event.agent_name} begins"
        case ModelRequested():
            what = f"asks its model, turn {event.iteration}"
        case DelegationStarted():
            what = f"hands over to {event.to_agent}: {event.query}"
        case ToolFinished():
            what = f"{event.tool_name} -> {event.result.error or event.result.content}"
        case RunFinished():
            what = f"{event.agent_name} ends: {event.result.stop_reason}, {event.result.usage.requests} request(s)"
        case _:
            return
    print(f"  {'|  ' * event.depth}{what}")


guide = BaseAgent("Guide", "You are the guide: say when museums are open.").add_tool(opening_hours)
cook = BaseAgent("Cook", "You are the cook: the input is JSON with a dish and the number of guests.")

coordinator = BaseAgent(
    "Coordinator", "You are the coordinator. Ask the guide and the cook, both at once.", observers=[watch]
)
coordinator.register_delegate(guide, description="Knows the museums.")
coordinator.register_delegate(
    cook,
    tool_name="plan_dinner",
    description="Plans a dinner.",
    parameters={
        "dish": {"type": "str", "description": "What to eat."},
        "guests": {"type": "int", "description": "How many eat.", "required": False, "default": 2},
    },
)


def show(result: AgentResult) -> None:
    print(f"  success={result.success}: {result.content}")
    print(f"  requests of all agents together: {result.usage.requests}\n")


async def main() -> None:
    print("Both specialists answer inside the coordinator's run:")
    show(await coordinator.run("A museum, then dinner.", limits=Limits(max_requests=6)))

    print("A budget holds for the whole tree, however the runs in it overtake each other:")
    show(await coordinator.run("A museum, then dinner.", limits=Limits(max_requests=3)))


def model(turn: Turn) -> AnswerLike:
    """Play all three models, told apart by their system prompts."""
    if "coordinator" in turn.system:
        if turn.results:
            return " ".join(turn.results)
        return [
            call("delegate_to_guide", {"query": "Museo Egizio"}),
            call("plan_dinner", {"dish": "agnolotti"}),
        ]
    if "cook" in turn.system:
        order = json.loads(turn.question)
        return f"{order['dish']} for {order['guests']}."
    return f"Open: {turn.results[0]}." if turn.results else call("opening_hours", {"museum": turn.question})


if __name__ == "__main__":
    with endpoint(model):
        asyncio.run(main())
