"""The same agents on trio, and nothing but trio: a nursery of runs, a cancel scope around one, a delegate.

python examples/trio_example.py
"""

import trio
from _offline import Turn, endpoint

from fractal import AgentResult, BaseAgent, RunContext, tool
from fractal.testing.answers import AnswerLike, call


@tool
async def look_up(word: str, ctx: RunContext) -> str:
    """Look a word up in the dictionary.

    Args:
        word: The word.
        ctx: The run that asks; the model does not see this parameter.
    """
    try:
        await trio.sleep(len(word) * 0.05)
        return f"{word}: a word of {len(word)} letters"
    except trio.Cancelled:
        print(f"  cleanup: {word!r} is not looked up any more")
        raise


linguist = BaseAgent("Linguist", "You are the linguist. Look every word up.").add_tool(look_up)
host = BaseAgent("Host", "You are the host. Hand questions about words to the linguist.").register_delegate(linguist)


async def main() -> None:
    print("A nursery of runs:")
    results: dict[str, AgentResult] = {}

    async def ask(word: str) -> None:
        results[word] = await linguist.run(word)

    async with trio.open_nursery() as nursery:
        for word in ("amber", "tide", "lichen"):
            nursery.start_soon(ask, word)
    for word in sorted(results):
        print(f"  {results[word].content}")

    print("A delegate is a run inside the run, with its deadline and its budget:")
    result = await host.run("archipelago", timeout=10)
    print(f"  {result.content} ({result.usage.requests} requests, both agents together)")

    print("A cancel scope around a run ends the whole tree, and waits until it has ended:")
    with trio.move_on_after(0.5) as scope:
        await host.run("perpetual motion")
    print(f"  cut={scope.cancelled_caught}")


def model(turn: Turn) -> AnswerLike:
    """Play both models: the host hands over, the linguist looks up, and both repeat what they are told."""
    if turn.results:
        return turn.results[0]
    if "host" in turn.system:
        return call("delegate_to_linguist", {"query": turn.question})
    return call("look_up", {"word": turn.question})


if __name__ == "__main__":
    with endpoint(model):
        trio.run(main)
