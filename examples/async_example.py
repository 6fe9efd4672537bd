"""An agent on asyncio: tools side by side, runs side by side, and a timeout that returns what was done.

python examples/async_example.py
"""

import asyncio
import json
import time

from _offline import Turn, endpoint
from pydantic import BaseModel

from fractal import AgentToolkit, BaseAgent
from fractal.testing.answers import AnswerLike, call


class Forecast(BaseModel):
    city: str
    degrees: int


class TravelAgent(BaseAgent):
    """Methods with the decorator are the agent's tools; annotations and docstrings tell the model how to use them."""

    def __init__(self) -> None:
        super().__init__(
            name="Travel",
            system_prompt="You help with trips from {home}. Always use both tools.",
            system_context={"home": "Turin"},
        )

    @AgentToolkit.register_as_tool
    async def forecast(self, city: str) -> Forecast:
        """Tell tomorrow's weather.

        Args:
            city: Name of the city.
        """
        await asyncio.sleep(0.4)  # a web service
        return Forecast(city=city, degrees=15 + len(city))

    @AgentToolkit.register_as_tool
    def next_train(self, destination: str) -> dict[str, str]:
        """Find the next train.

        Args:
            destination: Where to.
        """
        time.sleep(0.4)  # a blocking client: a plain `def` has a worker thread and blocks nobody
        return {"destination": destination, "leaves": "8:05"}


async def main() -> None:
    agent = TravelAgent()
    print(agent)

    print("\nOne run. The model calls two tools, which take 0.4 s each, and they run at the same time:")
    result = await agent.run("Rome")
    print(f"  {result.content}")
    print(f"  tools: {', '.join(f'{tool.tool_name} {tool.elapsed:.1f} s' for tool in result.tool_results)}")
    print(f"  whole run: {result.elapsed:.1f} s")

    print("\nThe agent remembers nothing; a conversation goes on with the messages of the last result:")
    result = await agent.run("and Oslo?", messages=result.messages)
    print(f"  {result.content} ({len(result.messages)} messages)")

    print("\nOne agent object serves any number of runs at once:")
    started = time.monotonic()
    results = await asyncio.gather(*(agent.run(city) for city in ("Nice", "Vienna", "Madrid")))
    for result in results:
        print(f"  {result.content}")
    print(f"  three runs together: {time.monotonic() - started:.1f} s")

    # The worker thread of the plain `def` cannot be stopped: "abandoned" says that it goes on without us.
    print("\nA run that takes too long is a result too, with all it had done:")
    result = await agent.run("Lisbon", timeout=0.3)
    print(f"  success={result.success} stop_reason={result.stop_reason}: {result.error}")
    for tool in result.tool_results:
        print(f"  {tool.tool_name}: {tool.outcome}")


def model(turn: Turn) -> AnswerLike:
    """Play the model: call both tools, then say what they told."""
    if not turn.results:
        city = turn.question.removeprefix("and ").rstrip("?")
        return [call("forecast", {"city": city}), call("next_train", {"destination": city})]
    weather, train = map(json.loads, turn.results)
    return f"{weather['city']}: {weather['degrees']} degrees, the train leaves at {train['leaves']}."


if __name__ == "__main__":
    with endpoint(model):
        asyncio.run(main())
