"""Agents for code that never awaits: scripts, threads, Django, Flask, Celery, notebooks.

The same loop as `BaseAgent.run` is driven on an event loop in a thread of its own, shared by all callers. Deadlines,
budgets and cancellation are those of the awaited verbs.
"""

from fractal.sync._portal import LoopBlockedWarning as LoopBlockedWarning, Portal as Portal, portal as portal
from fractal.sync.agent import (
    BaseAgent as BaseAgent,
    Handle as Handle,
    execute_tool as execute_tool,
    run as run,
    run_many as run_many,
    start as start,
)

__all__ = [
    "BaseAgent",
    "Handle",
    "LoopBlockedWarning",
    "Portal",
    "execute_tool",
    "portal",
    "run",
    "run_many",
    "start",
]
