"""What an agent holds, and what can be done with it."""
