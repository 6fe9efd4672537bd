"""LLM agents as structured concurrency.

A run is a tree of tasks under one cancel scope: when the call returns, the tree is gone. The same agent runs on
asyncio and on trio, and `fractal.sync` gives blocking callers the same guarantees.

Where to find what: `agent` has `BaseAgent` and its verbs, and the other public modules the nouns that users hold.
Of the private folders `_engine` makes a run, `_agent` is what an agent holds, `_functions` reads users' functions,
`_answers` are typed answers, and `_concurrency`, which knows no agent, is what all of it stands on. `models` asks
endpoints, `sync` is for blocking code, `tracing` keeps what runs did, `testing` is for tests, `cli` for the terminal.
`docs/architecture.md` tells why.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fractal._names import *  # noqa: F403  # its `__all__` says what there is
else:
    # Loaded when the first name is asked for: pytest loads this package, for its plugin, at each start in every project
    # that has it installed.

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        names = import_module("fractal._names")
        try:
            return globals().setdefault(name, getattr(names, name))
        except AttributeError:
            raise import_module("fractal._elsewhere").no_such_name(__name__, name) from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
