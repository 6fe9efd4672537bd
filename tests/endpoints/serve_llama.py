"""Starts the server of llama.cpp, as it is inside the package `xllamacpp`: `python serve_llama.py PORT MODEL KEY`."""

from __future__ import annotations

import sys
import threading

import xllamacpp

CONTEXT = 4096
SLOTS = 4


def main(port: int, model: str, key: str) -> None:
    """Serve until the process is ended."""
    options = xllamacpp.CommonParams()
    options.port, options.api_keys = port, [key]
    options.model.path, options.model_alias = model, ["tiny"]
    options.n_parallel, options.n_ctx = SLOTS, SLOTS * CONTEXT
    options.endpoint_slots = options.endpoint_metrics = True
    options.cpuparams.n_threads = 1
    options.ui = False
    server = xllamacpp.Server(options)
    print(server.listening_address, flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
