"""Agents behind FastAPI: routes for runs that end with their clients or outlive them, with approvals and streams.

Needs the extra `fastapi`.
"""

from importlib import import_module

try:
    import_module("fastapi.sse")
except ImportError as missing:  # pragma: no cover - installed wherever the tests run
    raise ImportError("fractal.serving needs FastAPI 0.135 or newer: pip install 'fractal-anyio[fastapi]'") from missing

from fractal.serving.app import serving_app
from fractal.serving.bodies import request_id
from fractal.serving.event_log import EventLog, LoggedEvent
from fractal.serving.lifespan import serving_lifespan
from fractal.serving.openai_routes import openai_router
from fractal.serving.problems import Problem
from fractal.serving.record import MemoryStore, RunRecord, RunStore
from fractal.serving.registry import ServedRuns
from fractal.serving.router import agent_router
from fractal.serving.run import RunAsked, ServedRun

__all__ = [
    "EventLog",
    "LoggedEvent",
    "MemoryStore",
    "Problem",
    "RunAsked",
    "RunRecord",
    "RunStore",
    "ServedRun",
    "ServedRuns",
    "agent_router",
    "openai_router",
    "request_id",
    "serving_app",
    "serving_lifespan",
]
