"""Values and exceptions that do not behave: what models, endpoints and tools may put into a result."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import BaseModel

from fractal import AnswerRejected, ModelError, RunError


def raises(self: Any, *arguments: Any) -> NoReturn:
    raise OSError("it is broken")


class Textless:
    __str__ = __repr__ = raises


class Exiting:
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class Numbered:
    def __str__(self) -> Any:
        return 5

    __repr__ = __str__


class Hostile(str):
    __slots__ = ()
    __str__ = __repr__ = encode = __format__ = raises  # type: ignore[assignment]


class Incomparable:
    __eq__ = __hash__ = raises  # type: ignore[assignment]


class Classless:
    __class__ = property(raises)  # type: ignore[assignment]


class Pretender:
    __class__ = str  # type: ignore[assignment]


class Closed:
    __getattribute__ = raises


class Unwilling(list[Any]):
    __iter__ = __len__ = raises


class Nameless(type):
    __name__ = property(raises)  # type: ignore[assignment]


class OfNameless(metaclass=Nameless):
    __str__ = __repr__ = raises


@dataclasses.dataclass
class Ring:
    inner: Any = None


class Model(BaseModel):
    inner: Any = None


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def containing_itself() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


def ring(kind: type[Any]) -> Any:
    value = kind()
    value.inner = value
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "half a surrogate pair": lambda: "\ud800",
    "half a pair in a key": lambda: {"\ud83d": ["\ude00"]},
    "half a pair in a model": lambda: Model(inner={"\ud83d": "\ud83d"}),
    "400 deep": lambda: nested(400),
    "100 000 deep": lambda: nested(100_000),
    "a list in itself": containing_itself,
    "a dataclass in itself": lambda: ring(Ring),
    "a model in itself": lambda: ring(Model),
    "5 000 digits": lambda: {"many": 10**5000},
    "not a number": lambda: [float("nan"), float("inf")],
    "odd keys": lambda: {(1, 2): 1, frozenset({3}): 2, None: 3, Textless: 4},
    "no str": Textless,
    "a str that exits": lambda: [Exiting()],
    "a str that is a number": Numbered,
    "text that is none": lambda: {"a": Hostile("b")},
    "no equality": Incomparable,
    "no class": Classless,
    "another class": lambda: [Pretender()],
    "no attributes": Closed,
    "a list that cannot be read": lambda: Unwilling([1, "\ud800"]),
    "a class without a name": OfNameless,
    "a function": lambda: lambda: 1,
    "a lock": threading.Lock,
    "an exception": lambda: Spent(),
    "something of everything": lambda: {"a": [Textless(), "\ud800"], "b": Model(inner=10**5000), "c": {1, 2}},
}


# ---- exceptions


class Spent(Exception):
    def __str__(self) -> str:
        return f"the quota of {self.tenant} is spent"  # type: ignore[attr-defined]  # nobody has set it


class SpentByExit(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class SpentByNumber(Exception):
    __str__ = Numbered.__str__


class Unshown(Exception):
    __str__ = __repr__ = raises


class Unwieldy(Exception):
    __str__ = raises
    args = property(raises)  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise OSError(name)


class Unlike(Exception):
    __str__ = __eq__ = __hash__ = raises  # type: ignore[assignment]


class Disguised(Exception):
    __class__ = RunError  # type: ignore[assignment]
    __str__ = raises


class Faceless(Exception):
    __class__ = property(raises)  # type: ignore[assignment]
    __str__ = raises


class Untouchable(Exception):
    __str__ = __getattribute__ = raises


class Group(ExceptionGroup[Exception]):
    exceptions = property(raises)  # type: ignore[assignment]
    __str__ = raises


class WrongValue(ValueError):
    __str__ = raises


class Rejection(AnswerRejected):
    def __init__(self) -> None:
        super().__init__("no")

    __str__ = raises


class Odd(RunError):
    stop_reason = error_type = property(raises)  # type: ignore[assignment]
    __str__ = raises


class OddModel(ModelError):
    """Made without its facts, and without a text."""

    def __init__(self) -> None:
        pass

    __str__ = raises


class UnknownReason(ModelError):
    stop_reason = "bored"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__("no")


EXCEPTIONS: dict[str, Callable[[], Exception]] = {
    **{
        kind.__name__: kind
        for kind in (Spent, SpentByExit, SpentByNumber, Unshown, Unwieldy, Unlike, Disguised, Faceless, Untouchable)
    },
    **{kind.__name__: kind for kind in (WrongValue, Rejection, Odd, OddModel, UnknownReason)},
    "Group": lambda: Group("several", [Spent(), Unshown()]),
    "a group of one": lambda: ExceptionGroup("one", [ExceptionGroup("inside", [Spent()])]),
}
