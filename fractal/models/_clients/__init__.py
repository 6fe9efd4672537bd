"""Ways to an endpoint through what users bring: an `openai` client, or any object with `create`."""
