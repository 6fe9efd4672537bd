"""Fixtures for the tests of functions as tools and hooks."""

from tests.without_uvloop import anyio_backend  # noqa: F401
