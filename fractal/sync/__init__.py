"""Agents for code that never awaits: scripts, threads, Django, Flask, Celery, notebooks.

The same loop as `BaseAgent.run` is driven on an event loop in a thread of its own, shared by all callers. Deadlines,
budgets and cancellation are those of the awaited verbs.
"""

from fractal.sync._entered import Entered as Entered, call as call, enter as enter
from fractal.sync._portal import LoopBlockedWarning as LoopBlockedWarning, Portal as Portal, portal as portal
from fractal.sync.agent import (
    BaseAgent as BaseAgent,
    execute_tool as execute_tool,
    resume as resume,
    run as run,
)
from fractal.sync.handle import Handle as Handle, start as start
from fractal.sync.many import BatchStream as BatchStream, run_many as run_many, stream_many as stream_many
from fractal.sync.streaming import RunStream as RunStream, stream as stream

__all__ = [
    "BaseAgent",
    "BatchStream",
    "Entered",
    "Handle",
    "LoopBlockedWarning",
    "Portal",
    "RunStream",
    "call",
    "enter",
    "execute_tool",
    "portal",
    "resume",
    "run",
    "run_many",
    "start",
    "stream",
    "stream_many",
]
