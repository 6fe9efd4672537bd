"""Runs watched while they happen: text as it is written, events of tools and delegates, and what leaving early does.

python examples/streaming_example.py
"""

import asyncio
from collections.abc import AsyncIterator

from _offline import Turn, endpoint

from fractal import (
    BaseAgent,
    Event,
    RunFinished,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    sync,
    tool,
)
from fractal.testing.answers import AnswerLike, call, text


@tool
async def weather(city: str) -> str:
    """Look up the weather.

    Args:
        city: Name of the city.
    """
    await asyncio.sleep(0.2)  # a web service
    return f"sunny in {city}"


@tool
async def archive(city: str) -> str:
    """Look up the weather of the last hundred years; takes a minute.

    Args:
        city: Name of the city.
    """
    print("  the archive is open")
    try:
        await asyncio.sleep(60)
        return f"mostly sunny in {city}"
    finally:
        print("  cleanup: the archive is closed again")


reporter = BaseAgent("Reporter", "You are the reporter. Look the weather up.").add_tool(weather).add_tool(archive)
editor = BaseAgent("Editor", "You are the editor. Have the reporter answer.").register_delegate(reporter)


def show(event: Event) -> None:
    """Print an event below the run it belongs to."""
    indent = "  " * (event.depth + 1)
    match event:
        case RunStarted():
            print(f"{indent}{event.agent_name} begins")
        case ToolStarted():
            print(f"{indent}> {event.tool_name} {event.arguments}")
        case ToolFinished():
            print(f"{indent}< {event.tool_name} {event.result.outcome}")
        case TextDelta():
            print(f"{indent}{event.text!r}")
        case RunFinished():
            print(f"{indent}{event.agent_name} ends: {event.result.stop_reason}")
        case _:
            pass


async def pieces(question: str) -> AsyncIterator[str]:
    """An answer as web frameworks want it: a generator that they step, and drop when the client goes away."""
    async with reporter.stream(question, timeout=60) as stream:
        async for piece in stream.text():
            yield piece


async def main() -> None:
    print("An answer, piece by piece:")
    print("  ", end="")
    async for piece in pieces("Rome"):
        print(piece, end="", flush=True)

    print("\n\nEverything that happens, in the run and in the run of its delegate:")
    async with editor.stream("Oslo") as stream:
        async for event in stream:
            show(event)
    result = await stream.result()
    print(f"  The result is that of run(): {result.content!r}, {result.usage.requests} requests of both agents")

    print("\nLeaving the block ends the run; here a tool would have gone on for a minute:")
    async with reporter.stream("a hundred years of Rome") as stream:
        async for event in stream:
            if isinstance(event, ToolStarted):
                await asyncio.sleep(0.1)  # left at once, the tool would not have been called
                break
    result = await stream.result()
    print(f"  {result.stop_reason}, with {', '.join(f'{t.tool_name} {t.outcome}' for t in result.tool_results)}")

    print("\nA reader that takes its time holds the run, not the memory:")
    async with reporter.stream("a long story", buffer=2) as stream:
        texts = stream.text()
        print(f"  {await anext(texts)!r}, then a pause …")
        await asyncio.sleep(0.5)
        print(f"  … then {await anext(texts)!r}, and that is enough")


def without_await() -> None:
    print("\nThe same without await:")
    with sync.stream(reporter, "Bern") as stream:
        print("  " + " | ".join(stream.text()))


def model(turn: Turn) -> AnswerLike:
    """Play both models: call the one tool that fits, then repeat what it told, a word at a time."""
    if turn.results:
        return text(f"It is {turn.results[0].removeprefix('It is ').rstrip('.')}.", chunk_delay=0.1)
    if "editor" in turn.system:
        return call("delegate_to_reporter", {"query": turn.question})
    if turn.question == "a long story":
        return text("Once upon a time. " * 500)
    name = "archive" if "hundred" in turn.question else "weather"
    return call(name, {"city": turn.question.split()[-1]})


if __name__ == "__main__":
    with endpoint(model):
        asyncio.run(main())
        without_await()
