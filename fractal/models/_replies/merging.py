"""The fields of a streamed message that nobody here knows, put together out of the pieces they come in.

Endpoints write what the next request has to bring back, such as reasoning and its signatures, in a form of their own.
What all of them share is how they stream it: texts grow, objects are filled, and lists get items, which an `index` or
their type tells apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal._json import is_list, is_mapping

__all__ = ["Merged"]

# Fields that say the same in each piece.
_CONSTANT = frozenset({"format", "id", "index", "name", "object", "role", "status", "type"})
# Fields that end an item: what comes after them is another one.
_CLOSING = frozenset({"signature", "thought_signature", "encrypted_content"})


class Merged:
    """An object that grows by the pieces of a stream.

    Each piece costs what it holds, however much there is already.
    """

    __slots__ = ("_fields",)

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._fields)

    def add(self, piece: Mapping[str, Any]) -> None:
        """Take the next piece."""
        for name, value in piece.items():
            if value is not None:
                self._add_field(name, value)

    def value(self) -> dict[str, Any]:
        """The whole so far."""
        return {name: _finished(value) for name, value in self._fields.items()}

    def get(self, name: str) -> Any:
        """One field so far, or None."""
        return _finished(self._fields.get(name))

    def takes(self, piece: Mapping[str, Any]) -> bool:
        """Whether a piece of a list's item can continue this item."""
        if any(self._fields.get(name) != piece.get(name) for name in ("id", "type") if name in piece):
            return False
        return not any(self._fields.get(name) for name in _CLOSING) or not any(
            value for name, value in piece.items() if name not in _CONSTANT and name not in _CLOSING
        )

    def _add_field(self, name: str, value: Any) -> None:
        known = self._fields.get(name)
        if isinstance(value, str) and name not in _CONSTANT:
            if not isinstance(known, _Text):
                self._fields[name] = _Text(value)
            elif name not in _CLOSING or known.size != len(value) or known.whole() != value:
                known.add(value)
        elif is_mapping(value):
            if not isinstance(known, Merged):
                known = self._fields[name] = Merged()
            known.add(value)
        elif is_list(value):
            if not isinstance(known, _Items):
                known = self._fields[name] = _Items()
            known.add(value)
        elif value != "" or name not in self._fields:
            self._fields[name] = value


class _Text:
    """A text that grows.

    Attributes:
        size: Its characters.
    """

    __slots__ = ("_pieces", "size")

    def __init__(self, text: str) -> None:
        self._pieces, self.size = [text], len(text)

    def __bool__(self) -> bool:
        return self.size > 0

    def add(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.size += len(text)

    def whole(self) -> str:
        return "".join(self._pieces)


class _Items:
    """A list that grows: by new items, and by pieces of the items it has."""

    __slots__ = ("_by_index", "_items", "_last")

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._by_index: dict[tuple[Any, Any], Merged] = {}
        self._last: Merged | None = None

    def add(self, pieces: list[Any]) -> None:
        # Only the first can go on with an item of an earlier piece: an endpoint does not cut one within a piece.
        for number, piece in enumerate(pieces):
            if is_mapping(piece):
                self._item_of(piece, can_go_on=number == 0).add(piece)
            else:
                self._items.append(piece)
                self._last = None

    def whole(self) -> list[Any]:
        return [item.value() if isinstance(item, Merged) else item for item in self._items]

    def _item_of(self, piece: Mapping[str, Any], *, can_go_on: bool) -> Merged:
        """The item that a piece belongs to."""
        index, kind = piece.get("index"), piece.get("type")
        if isinstance(index, int) and isinstance(kind, str | None):
            item = self._by_index.get((index, kind))
            if item is None:
                item = self._by_index[index, kind] = self._new()
            return item
        if can_go_on and kind is not None and self._last is not None and self._last.takes(piece):
            return self._last
        return self._new()

    def _new(self) -> Merged:
        item = self._last = Merged()
        self._items.append(item)
        return item


def _finished(value: Any) -> Any:
    if isinstance(value, (_Text, _Items)):
        return value.whole()
    return value.value() if isinstance(value, Merged) else value
