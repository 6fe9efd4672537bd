"""What the routes for OpenAI's clients are made of: requests read, answers in their form, runs watched."""
