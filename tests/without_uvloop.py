"""The fixture `anyio_backend` for modules and folders of tests that import it because uvloop shows nothing new there.

That is where tasks only wait for each other, or where what matters is what is said and not how it is sent. Runs tell
the same on uvloop: `tests/promises/test_parity.py` shows it. What uvloop has of its own, connections, threads, timers
and cancellations, is shown by the tests of these.
"""

from __future__ import annotations

import pytest

from tests.support import BACKENDS


@pytest.fixture(params=[each for each in BACKENDS if "uvloop" not in str(each.id)])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return request.param
