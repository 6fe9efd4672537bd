"""Typed answers: how they are asked for, how they are read, and how they are shown while they grow."""
