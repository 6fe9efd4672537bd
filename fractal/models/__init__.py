"""Who answers: the `Model` protocol, the models behind OpenAI-compatible endpoints, and models in combination."""

from typing import TYPE_CHECKING

from fractal._elsewhere import no_such_name as _no_such_name
from fractal.model import (
    Delta as Delta,
    Model as Model,
    ModelRequest as ModelRequest,
    ModelSettings as ModelSettings,
    Reply as Reply,
    Sink as Sink,
    StreamingModel as StreamingModel,
    ToolCall as ToolCall,
)
from fractal.models.bounds import ReplyBounds as ReplyBounds
from fractal.models.combined import (
    FallbackModel as FallbackModel,
    LimitedModel as LimitedModel,
    RaceModel as RaceModel,
)
from fractal.models.openai import OpenAIModel as OpenAIModel

__all__ = [
    "Delta",
    "FallbackModel",
    "LimitedModel",
    "Model",
    "ModelRequest",
    "ModelSettings",
    "OpenAIModel",
    "RaceModel",
    "Reply",
    "ReplyBounds",
    "Sink",
    "StreamingModel",
    "ToolCall",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        raise _no_such_name(__name__, name)
