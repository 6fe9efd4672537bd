"""What the routes for AG-UI's clients are made of: inputs read, events put in the protocol's words, runs watched."""
