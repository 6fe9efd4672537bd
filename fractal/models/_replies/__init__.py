"""Replies as endpoints write them, whole or streamed, and how they are read."""
