"""Answers as Python objects: a checked invoice, a type for one run, an object that grows, and a model that gives up.

python examples/structured_output_example.py
"""

import asyncio
import json
from typing import Literal

from _offline import Turn, endpoint
from pydantic import BaseModel, Field

from fractal import AnswerRejected, BaseAgent, InvalidOutput
from fractal.testing.answers import AnswerLike

ORDER = "Ada Byrne wants 3 boxes of screws at 4.50 euros each, and a drill for 89 euros."


class Line(BaseModel):
    article: str
    pieces: int = Field(ge=1)
    price: float = Field(description="Euros for one piece.")


class Invoice(BaseModel):
    """What a customer has to pay."""

    customer: str
    lines: list[Line]
    total: float


clerk = BaseAgent("Clerk", "You are the clerk. You read orders.", output_type=Invoice)


@clerk.output_validator
def adds_up(invoice: Invoice) -> None:
    """Check what no schema can say; the model is told, and answers again."""
    total = sum(line.pieces * line.price for line in invoice.lines)
    if abs(total - invoice.total) > 0.005:
        raise AnswerRejected(f"the lines add up to {total:.2f}, and the total says {invoice.total:.2f}")


async def main() -> None:
    print("An invoice; the first answer does not add up, and goes back to the model:")
    result = await clerk.run(ORDER)
    invoice = result.raise_for_error().content
    for line in invoice.lines:
        print(f"  {line.pieces} x {line.article}, {line.price:.2f}")
    print(f"  {invoice.customer} pays {invoice.total:.2f} euros ({result.usage.requests} requests)")

    print("\nOne run may ask for something else: a list, or one word of some.")
    articles = await clerk.run(f"Which articles? {ORDER}", output_type=list[str])
    print(f"  {articles.content}")
    kind = await clerk.run(f"What is this? {ORDER}", output_type=Literal["order", "complaint", "praise"])
    print(f"  {kind.content!r}")

    print("\nAn object as it is written; what has not come yet is None:")
    seen = 0
    async with clerk.stream(ORDER) as stream:
        async for so_far in stream.partial():
            lines: list[Line] = so_far.lines or []
            if len(lines) > seen:
                seen = len(lines)
                print(f"  {seen} line(s), total {so_far.total}")
    print(f"  whole: {(await stream.result()).content.total}")

    print("\nA model that never gets it right is not asked for ever:")
    result = await clerk.run("hello", max_retries=1)
    if isinstance(result.exception, InvalidOutput):
        print(f"  {result.exception.attempts} answers, the last one: {result.exception.fault}")


def model(turn: Turn) -> AnswerLike:
    """Play the model: forget the drill in the total, until it is told."""
    if "Which articles?" in turn.question:
        return json.dumps({"result": ["screws", "drill"]})
    if "What is this?" in turn.question:
        return json.dumps({"result": "order"})
    if turn.question == "hello" or "not valid JSON" in turn.question:
        return "Hello to you too!"
    screws = {"article": "screws", "pieces": 3, "price": 4.5}
    drill = {"article": "drill", "pieces": 1, "price": 89.0}
    total = 102.5 if "add up" in turn.question else 13.5
    return json.dumps({"customer": "Ada Byrne", "lines": [screws, drill], "total": total})


if __name__ == "__main__":
    with endpoint(model):
        asyncio.run(main())
