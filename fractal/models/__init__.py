"""Who answers: the `Model` protocol and the models behind OpenAI-compatible endpoints."""

from fractal.models.base import (
    Model as Model,
    ModelRequest as ModelRequest,
    ModelSettings as ModelSettings,
    Reply as Reply,
    ToolCall as ToolCall,
)
from fractal.models.openai import OpenAIModel as OpenAIModel

__all__ = ["Model", "ModelRequest", "ModelSettings", "OpenAIModel", "Reply", "ToolCall"]
