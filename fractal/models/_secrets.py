"""The secrets of a request, and texts without them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NO_SECRETS", "Secrets"]

_SHORTEST = 4  # characters; what is shorter would be found in ordinary words
_LONGEST_TEXT = 1000  # characters that are quoted of what an endpoint says


class Secrets:
    """Keys, tokens and passwords that no error, event or log line may repeat.

    Args:
        *values: The secrets; those of fewer than four characters are left out, since they are found in ordinary words.
    """

    __slots__ = ("_values",)

    def __init__(self, *values: str | None) -> None:
        found = {part for value in values if value for part in (value, value.strip()) if len(part) >= _SHORTEST}
        # The longest first: one secret may be a part of another.
        self._values = sorted(found, key=len, reverse=True)

    def plus(self, values: Iterable[str]) -> Secrets:
        """These secrets and further ones."""
        return Secrets(*self._values, *values)

    def removed_from(self, text: str) -> str:
        """The text with `[key]` in place of each secret."""
        for value in self._values:
            text = text.replace(value, "[key]")
        return text

    def quoted(self, text: object, longest: int = _LONGEST_TEXT) -> str:
        """The text of a value without the secrets, and only then cut, so that no half of a secret stays."""
        clean = self.removed_from(str(text))
        return clean if len(clean) <= longest else clean[:longest] + "…"


NO_SECRETS = Secrets()
"""Those of a request that was not signed, as far as is known."""
