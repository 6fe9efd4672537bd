"""Users' functions: what they say of themselves, what they are called with, and what they return."""
