"""The agent that the command line asks: `--agent module:attribute`, or an assistant without tools."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from typing_extensions import TypeIs

from fractal._texts import described, message_of, type_name
from fractal.agent import BaseAgent
from fractal.definition import AgentDefinition
from fractal.models.openai import OpenAIModel

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["OTHER_ENDPOINTS", "WrongUse", "agent_at", "assistant", "checked_url", "imported"]

OTHER_ENDPOINTS = (
    "for a server of your own set OPENAI_BASE_URL, or give --base-url; `fractal endpoint` starts one to try things with"
)


class WrongUse(Exception):
    """The command line was used in a way that cannot work; the text says what would."""


def assistant(model: str | None, base_url: str | None) -> AgentDefinition:
    """An assistant without tools, at the endpoint of the environment or another.

    Raises:
        WrongUse: The endpoint's URL is none, or there is neither a URL nor a key.
    """
    if not checked_url(base_url) and not os.environ.get("OPENAI_API_KEY"):
        raise WrongUse(f"there is no API key: set OPENAI_API_KEY; {OTHER_ENDPOINTS}")
    return BaseAgent("assistant", "You are a helpful assistant.", model, OpenAIModel(base_url=base_url))


def checked_url(base_url: str | None) -> str | None:
    """The URL of an endpoint, of the environment if none is given.

    Raises:
        WrongUse: It cannot be one.
    """
    named, url = ("--base-url", base_url) if base_url else ("OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL"))
    if not url:
        return None
    shown = re.sub(r"^((?:\w+://)?)[^/]*@", r"\1", url)  # without a password
    if not url.startswith(("http://", "https://")):
        meant = f"http://{shown.partition('://')[2] or shown}"
        raise WrongUse(f"{named} {shown}: a URL begins with http:// or https://: write {meant}")
    try:
        is_whole = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError as error:
        raise WrongUse(f"{named} {shown}: {error}") from None
    if not is_whole:
        raise WrongUse(f"{named} {shown}: write it with host and port, as in http://127.0.0.1:8000/v1")
    return url


def agent_at(path: str) -> AgentDefinition:
    """The agent at `module:attribute`, or the one that a class or function there makes.

    Raises:
        WrongUse: There is none.
        Exception: What making it raises.
    """
    return _made(path, _found(path))


def _found(path: str) -> object:
    module_name, colon, attribute = path.partition(":")
    if _is_file(module_name):
        parts = PurePath(module_name).with_suffix("").parts
        raise WrongUse(
            f"--agent {path}: give the module and not its file: write {'.'.join(parts)}:{attribute or 'agent'}"
        )
    if not colon or not module_name or not attribute:
        raise WrongUse(f"--agent {path}: write module:attribute, as in app.agents:planner")
    module = imported(module_name)
    found: object = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise WrongUse(f"module {module_name!r} has no {attribute!r}; {_agents_of(module)}") from None
    return found


def _is_file(name: str) -> bool:
    return name.endswith(".py") or os.sep in name or "/" in name


def imported(name: str) -> ModuleType:
    """The module of that name; those of the current directory are found.

    Raises:
        WrongUse: There is none, or it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise WrongUse(f"there is no module {name!r}, neither installed nor in {os.getcwd()}") from None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # A syntax error names its own frame.
        where = "" if isinstance(error, SyntaxError) else f" ({frame.filename}:{frame.lineno})"
        raise WrongUse(f"module {name!r} cannot be imported: {described(error)}{where}") from error


def _agents_of(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, AgentDefinition)]
    return f"its agents: {', '.join(names)}" if names else "there is no agent in it"


def _made(path: str, found: object) -> AgentDefinition:
    """The agent that an attribute is, or makes."""
    if _is_agent(found):
        return found
    if not callable(found) or _is_other_class(found):
        raise WrongUse(f"{path} is {_kind(found)}, not an agent")
    make: Callable[[], object] = found
    if inspect.iscoroutinefunction(make):
        raise WrongUse(f"{path} is an async function: give a plain one that returns an agent")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        why = message_of(error)
        raise WrongUse(f"{path} is {_kind(make)} that cannot be called without arguments: {why}") from None
    agent = make()
    if not _is_agent(agent):
        raise WrongUse(f"{path}() is {_kind(agent)}, not an agent")
    return agent


def _is_agent(found: object) -> TypeIs[AgentDefinition]:
    return isinstance(found, AgentDefinition)


def _is_other_class(found: object) -> bool:
    return isinstance(found, type) and not issubclass(found, AgentDefinition)


def _kind(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    if inspect.isroutine(found):
        return "a function"
    return "None" if found is None else f"of type {type_name(found)}"
