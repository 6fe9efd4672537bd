"""The forms that results and events take, whatever is in them: as JSON, as text, and for another process."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from fractal._json import jsonable
from fractal._texts import clean_text, repr_of, str_of, text_by

__all__ = ["AnyMessage", "AnyObject", "AsJson", "Count", "PortableModel", "Text", "portable", "portable_error", "shown"]


def _read_text(value: object) -> object:
    return _written_text(value) if isinstance(value, str) else value


def _written_text(value: object) -> str:
    return clean_text(value) if isinstance(value, str) else str_of(value)


def _written_count(count: int) -> int:
    return min(max(count, -_HIGHEST), _HIGHEST)


_HIGHEST = 2**63 - 1  # readers of JSON take no number of any length

AsJson = PlainSerializer(jsonable, when_used="json")
"""In JSON, whatever it is takes the form it has there."""

AnyObject = Annotated[Any, AsJson]
"""Any Python object, kept as it is; in JSON it takes the form it has there."""

Text = Annotated[str, BeforeValidator(_read_text), PlainSerializer(_written_text, return_type=str, when_used="json")]
"""Text that somebody else may have written: lone surrogates in it, which JSON cannot carry, are replaced."""

AnyMessage = Annotated[dict[Text, Any], AsJson]
"""A chat message, whatever is in it."""

Count = Annotated[int, PlainSerializer(_written_count, return_type=int, when_used="json")]
"""A number that somebody else may have counted."""


class PortableModel(BaseModel):
    """Base of the pydantic models of a run's outcome, whose values may be of any class."""

    model_config = ConfigDict(defer_build=True)

    def __repr_str__(self, join_str: str) -> str:
        """The text of the fields for `repr()` and `str()`."""
        named = ((name, shown(value)) for name, value in self.__repr_args__())
        return join_str.join(text if name is None else f"{name}={text}" for name, text in named)

    def __getstate__(self) -> dict[Any, Any]:
        """The state for a pickle, without values that cannot be pickled."""
        state = super().__getstate__()
        facts: dict[str, Any] = state["__dict__"]
        names = ("content", "messages", "pending")
        loose: dict[str, Any] = {name: portable(facts[name]) for name in names if name in facts}
        if "metadata" in facts:
            messages = facts.get("messages")
            loose["metadata"] = {
                name: loose["messages"] if value is messages else portable(value)
                for name, value in facts["metadata"].items()
            }
        private: dict[str, Any] | None = state["__pydantic_private__"]
        if private is not None:
            private = {**private, "_exception": portable_error(private.get("_exception"))}
        return {**state, "__dict__": {**facts, **loose}, "__pydantic_private__": private}


def shown(value: object) -> str:
    """Text of a value by its `repr()`; that of its form in JSON where something in it has none."""
    return text_by(repr, value, lambda value: repr_of(jsonable(value)))


_PLAIN = (str, int, float, bool, bytes, type(None))


def portable(value: Any) -> Any:
    """The value if another process can get it in a pickle, else its form in JSON."""
    if type(value) in _PLAIN or issubclass(type(value), PortableModel):
        return value
    try:
        _sent(value)
    except Exception:
        return jsonable(value)
    return value


def portable_error(error: BaseException | None) -> BaseException | None:
    """The exception if a pickle can take it, else None."""
    if error is None:
        return None
    try:
        reduced: Any = error.__reduce_ex__(4)
        make, arguments, *rest = reduced
        facts = dict(rest[0]) if rest and rest[0] else {}
        facts.pop("result", None)  # it may lead back to what is being written, and sees to itself
        make, arguments, _ = _sent((make, arguments, facts))
        make(*arguments)
    except Exception:
        return None
    return error


def _sent(value: Any) -> Any:
    """A value as another process would get it."""
    import pickle  # few results are ever sent

    return pickle.loads(pickle.dumps(value))  # much can be written that cannot be read again
