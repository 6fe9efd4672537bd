"""What all adapters do: the question, the tool, what has to come out; and a few words with the machine.

It imports nothing but the standard library, since it is loaded in every environment.
"""

from __future__ import annotations

import os
import resource
from typing import Any

MODEL = "gpt-4o-mini"
PROMPT = "You look."
QUESTION = "Where does it rain?"
ANSWER = "Take an umbrella with you."

MARK = b"rain in place"
"""In each result of `look`, and in nothing else, so that the endpoint can count results by it."""

REPORT = "A colleague reports rain in place 1."
"""What an agent that was asked answers; the result of the call that asked it."""

CHUNKS = 500
FINAL = 900_000
OBJECT = '{"city":"Paris","degrees":21,"sunny":true,"hours":[9,12,15]}'
HISTORY_TEXT = "What was the weather like on that day, and what should one have worn in the hills? " * 2

PATIENCE = 600.0
"""Seconds a client waits. The 5 s that the SDK has for a connect are not enough where 500 runs start on a busy core."""

DESCRIPTION = "Look at a place."
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": DESCRIPTION,
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


class Looks:
    """How often the tool has really run."""

    count = 0


async def look(place: str) -> str:
    """Look at a place."""
    Looks.count += 1
    return f"There is rain in {place}."


def look_plain(place: str) -> str:
    """Look at a place."""
    Looks.count += 1
    return f"There is rain in {place}."


def history(count: int) -> list[dict[str, Any]]:
    """So many messages, of a user and an assistant in turn; the next one is the user's."""
    return [
        {"role": "user" if number % 2 == 0 else "assistant", "content": f"{number}: {HISTORY_TEXT}"}
        for number in range(count - count % 2)
    ]


def pin(core: int) -> bool:
    """Keep this process on one core, where the system can do so and there are several."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return False
    os.sched_setaffinity(0, {cores[core]})
    return True


def raise_file_limit() -> None:
    """Allow this process as many open files as it may have: ten thousand runs have a socket each."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
