"""Who asks: whose a request is, and what tools find, as dependencies of the application say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from fastapi import Depends
from fastapi.params import Depends as Dependency
from starlette.requests import Request

from fractal._texts import repr_of
from fractal.errors import InvalidArguments
from fractal.serving.problems import Problem

__all__ = ["deps_of", "noting", "owner_of"]


def noting(owner: Callable[..., Any] | None, deps: Callable[..., Any] | None) -> list[Dependency]:
    """Dependencies of a router that note the values of two others in the state of each request.

    Args:
        owner: Says whose a request is; a request of nobody's is refused. None: all are of one owner.
        deps: Gives what tools find as `ctx.deps`. None: nothing.
    """
    noted = [] if owner is None else [_noting("fractal_owner", owner, _owner)]
    return noted if deps is None else [*noted, _noting("fractal_deps", deps, lambda value: value)]


def _noting(name: str, dependency: Callable[..., Any], read: Callable[[Any], object]) -> Dependency:
    depends: Any = Depends(dependency)

    async def note(request: Request, value: Any = depends) -> None:
        setattr(request.state, name, read(value))

    noted: Dependency = Depends(note)
    return noted


def _owner(value: Any) -> str:
    """The owner that a dependency gives.

    Raises:
        Problem: It gives nobody. All of these would otherwise be one owner, and see each other's runs.
        InvalidArguments: It gives something whose text may be that of others too, or another one each time.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Problem(401, "unknown_owner", "it is not known who asks")
    if isinstance(value, bool) or not isinstance(value, str | int | UUID):
        raise InvalidArguments(f"owner= gave {repr_of(value)}: give a text, a number or a UUID that nobody else has")
    return str(value)


def owner_of(request: Request) -> str | None:
    """Whose a request is; None where all are of one owner."""
    owner: str | None = _noted(request, "fractal_owner")
    return owner


def deps_of(request: Request) -> Any:
    """What tools find as `ctx.deps`."""
    return _noted(request, "fractal_deps")


def _noted(request: Request, name: str) -> Any:
    state: Any = request.scope.get("state")  # not `request.state`, which is slow to say that there is nothing
    return state.get(name) if state else None
