"""Who asks: whose a request is, and what tools find, as dependencies of the application say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends
from fastapi.params import Depends as Dependency
from starlette.requests import Request

__all__ = ["deps_of", "noting", "owner_of"]


def noting(owner: Callable[..., Any] | None, deps: Callable[..., Any] | None) -> list[Dependency]:
    """Dependencies of a router that note the values of two others in the state of each request.

    Args:
        owner: Says whose a request is. None: all are of one owner.
        deps: Gives what tools find as `ctx.deps`. None: nothing.
    """
    named = {"fractal_owner": owner, "fractal_deps": deps}
    return [_noting(name, dependency) for name, dependency in named.items() if dependency is not None]


def _noting(name: str, dependency: Callable[..., Any]) -> Dependency:
    depends: Any = Depends(dependency)

    async def note(request: Request, value: Any = depends) -> None:
        setattr(request.state, name, value)

    noted: Dependency = Depends(note)
    return noted


def owner_of(request: Request) -> str | None:
    """Whose a request is; None where all are of one owner."""
    owner = _noted(request, "fractal_owner")
    return None if owner is None else str(owner)


def deps_of(request: Request) -> Any:
    """What tools find as `ctx.deps`."""
    return _noted(request, "fractal_deps")


def _noted(request: Request, name: str) -> Any:
    state: Any = request.scope.get("state")  # not `request.state`, which is slow to say that there is nothing
    return state.get(name) if state else None
