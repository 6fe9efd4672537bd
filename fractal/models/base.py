"""The nouns of `fractal.model`, where they used to be."""

from fractal.model import (
    UNSAID as UNSAID,
    Delta as Delta,
    Model as Model,
    ModelRequest as ModelRequest,
    ModelSettings as ModelSettings,
    Reply as Reply,
    Sink as Sink,
    StreamingModel as StreamingModel,
    ToolCall as ToolCall,
    ToolSchemas as ToolSchemas,
    ask_model as ask_model,
    stream_or_respond as stream_or_respond,
)
