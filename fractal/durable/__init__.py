"""Durable runs on one machine: journals that keep what a run has done, so that it outlives its process."""

from fractal.durable.memory import MemoryJournal as MemoryJournal
from fractal.durable.sqlite import SQLiteJournal as SQLiteJournal
from fractal.journal import Journal as Journal, OpenJournal as OpenJournal, StepKey as StepKey

__all__ = ["Journal", "MemoryJournal", "OpenJournal", "SQLiteJournal", "StepKey"]
