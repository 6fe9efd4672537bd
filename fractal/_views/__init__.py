"""Runs for people to look at: trees, timelines and bars."""
