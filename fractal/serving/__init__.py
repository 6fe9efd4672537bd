"""Agents behind HTTP; needs the extra `fastapi`."""
