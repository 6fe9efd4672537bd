"""The chat page: how it is served. What a browser is given stands beside this as files, and nothing builds them."""
