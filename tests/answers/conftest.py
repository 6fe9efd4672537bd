"""Fixtures for the tests of typed answers."""

from tests.without_uvloop import anyio_backend  # noqa: F401
