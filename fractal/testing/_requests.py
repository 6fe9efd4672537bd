"""What a model was asked, in one shape: in scripts, in `ScriptedModel.requests` and in those of an `Endpoint`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fractal._json import is_list
from fractal.model import ModelRequest

__all__ = ["ScriptedRequest", "messages_of", "tools_of"]


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request; none if it has no list of them."""
    messages = body.get("messages")
    return messages if is_list(messages) else []


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools on offer in a request, as chat-completions schemas."""
    tools = body.get("tools")
    return tools if is_list(tools) else []


class ScriptedRequest(dict[str, Any]):
    """A request to a `ScriptedModel`: its fields, and those of them that tests look at most.

    Everything else of the `ModelRequest` can be read as well, such as `request.transcript` and `request.settings`.

    Example:
        >>> from fractal.testing import ScriptedModel
        >>> model = ScriptedModel(lambda request: request.messages[-1]["content"].upper())
        >>> from fractal import BaseAgent, sync
        >>> sync.run(BaseAgent("Echo", "You repeat.", client=model), "hi").content
        'HI'
        >>> [request.messages[-1]["content"] for request in model.requests]
        ['hi']
    """

    def __init__(self, request: ModelRequest) -> None:
        super().__init__(request.parameters())
        self._request = replace(request, control=None)  # which would keep the run, as long as the model is there

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the request, as an endpoint would get them."""
        return self

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages, the system prompt first."""
        return messages_of(self)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools on offer, as chat-completions schemas; empty if there are none."""
        return tools_of(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copies and pickles ask before there is a request
            raise AttributeError(f"a request has no {name!r}")
        return getattr(self._request, name)
