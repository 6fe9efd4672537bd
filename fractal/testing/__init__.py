"""Tools for tests: models and endpoints that answer as told, and what proves that an agent stops."""

from fractal.testing import answers as answers
from fractal.testing._blocking import (
    RealRequestBlocked as RealRequestBlocked,
    block_real_requests as block_real_requests,
)
from fractal.testing._history import check_messages as check_messages
from fractal.testing._killed import KillWorld as KillWorld
from fractal.testing._nothing_left import NothingLeft as NothingLeft, assert_nothing_left as assert_nothing_left
from fractal.testing._recording import EventRecorder as EventRecorder, record_events as record_events
from fractal.testing._requests import ScriptedRequest as ScriptedRequest
from fractal.testing._virtual_time import (
    NotInVirtualTime as NotInVirtualTime,
    VirtualTime as VirtualTime,
    virtual_time as virtual_time,
)
from fractal.testing.cancelling import (
    CancellationFault as CancellationFault,
    CancellationFaults as CancellationFaults,
    CancelReport as CancelReport,
    cancel_everywhere as cancel_everywhere,
)
from fractal.testing.endpoint import (
    Endpoint as Endpoint,
    EndpointError as EndpointError,
    RecordedRequest as RecordedRequest,
)
from fractal.testing.killing import (
    KillFaults as KillFaults,
    KillReport as KillReport,
    kill_everywhere as kill_everywhere,
)
from fractal.testing.scripted import ScriptedModel as ScriptedModel
from fractal.testing.stalling import stall_guard as stall_guard

__all__ = [
    "CancelReport",
    "CancellationFault",
    "CancellationFaults",
    "Endpoint",
    "EndpointError",
    "EventRecorder",
    "KillFaults",
    "KillReport",
    "KillWorld",
    "NotInVirtualTime",
    "NothingLeft",
    "RealRequestBlocked",
    "RecordedRequest",
    "ScriptedModel",
    "ScriptedRequest",
    "VirtualTime",
    "answers",
    "assert_nothing_left",
    "block_real_requests",
    "cancel_everywhere",
    "check_messages",
    "kill_everywhere",
    "record_events",
    "stall_guard",
    "virtual_time",
]
