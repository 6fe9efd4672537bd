"""Fixtures for the tests of agents and their settings."""

from tests.without_uvloop import anyio_backend  # noqa: F401
