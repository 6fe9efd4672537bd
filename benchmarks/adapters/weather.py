"""The answer as an object; apart from the rest, since not everybody needs pydantic."""

from __future__ import annotations

import pydantic


class Weather(pydantic.BaseModel):
    """The weather somewhere."""

    model_config = pydantic.ConfigDict(extra="forbid")
    city: str
    degrees: int
    sunny: bool
    hours: list[int]
