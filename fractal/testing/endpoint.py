"""An OpenAI-compatible HTTP endpoint on the loopback interface, for tests.

The endpoint runs in a thread with an event loop of its own, so it serves clients on asyncio, on trio and
in blocking code alike, and a client that is cancelled or stuck does not stop it. It answers from a script
(see `fractal.testing.answers`), refuses chat histories a provider would refuse, and counts what a client
otherwise hides: open connections, requests in flight, answers nobody waited for.

```python
from fractal.testing import answers
from fractal.testing.endpoint import Endpoint

with Endpoint([answers.failure(429, retry_after=0), "hi"]) as endpoint:
    client = OpenAI(base_url=endpoint.url, api_key="any")
    ...
    assert len(endpoint.requests) == 2
```
"""

import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias
from weakref import WeakSet

import anyio
import anyio.abc

from fractal._texts import repr_of
from fractal.testing import answers as _answers
from fractal.testing._history import check_messages
from fractal.testing._http import Connection, ReadyReply, RecordedRequest, ready_reply
from fractal.testing.answers import Answer, AnswerLike, ToolCallAnswer, as_answer

__all__ = ["Answers", "Endpoint", "EndpointError", "RecordedRequest", "endpoint_ports"]

_START_LIMIT = 10.0
_STOP_LIMIT = 10.0


class EndpointError(Exception):
    """The endpoint itself failed: its answers raised, or it could not start or stop; see `__cause__`."""


Answers: TypeAlias = AnswerLike | Sequence[AnswerLike] | Callable[[RecordedRequest], AnswerLike] | None
"""What an endpoint answers; `Endpoint` tells how each form is read."""

_Source: TypeAlias = Callable[[RecordedRequest], Answer]


_started: WeakSet["Endpoint"] = WeakSet()


def endpoint_ports() -> set[int | None]:
    """The ports of the endpoints that run now."""
    return {endpoint._port for endpoint in list(_started)}  # pyright: ignore[reportPrivateUsage]


class Endpoint:
    """A chat completions server on 127.0.0.1, at a port the system chooses.

    It answers POST to any path that ends in `/chat/completions` (so Azure's deployments too), whole or
    streamed, and GET of `/models`; anything else is a 404. Use it as a context manager, or call `start`
    and `close`. The `wait_…` methods block the thread that calls them; from a coroutine use
    `await anyio.to_thread.run_sync(endpoint.wait_for_requests, 1)`.

    Example:
        ```python
        with Endpoint(lambda request: request.body["messages"][-1]["content"].upper()) as endpoint:
            ...
        ```

    Args:
        answers: A list or another sequence is a script, consumed in order of arrival; when it is used up
            a request is answered 400 with the code "script_exhausted". One text, call or `Answer` is the
            answer to every request, None is "ok". A function is given each request and is called in the
            endpoint's thread, so it must not block.
        latency: Seconds added to the delay of every answer.
        api_key: The key a request has to carry, as a bearer token or in an `api-key` header; a request
            without it is answered 401. None lets everyone in.
        strict: Answer 400 with the code "invalid_messages" to what `check_messages` refuses.
        port: Where to listen. 0: the system chooses.

    Attributes:
        requests: Every request, refused ones included, in order of arrival.
        connections: Connections open now.
        connections_opened: Connections opened since the start.
        in_flight: Requests being answered now.
        max_in_flight: The most there were at once.
        disconnects: Requests whose client went away before the whole answer was sent.
    """

    def __init__(
        self,
        answers: Answers = None,
        *,
        latency: float = 0.0,
        api_key: str | None = None,
        strict: bool = True,
        port: int = 0,
    ) -> None:
        self.requests: list[RecordedRequest] = []
        self.connections = 0
        self.connections_opened = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.disconnects = 0
        self._script: deque[Answer] = deque()
        self._source = self._read(answers)
        self._latency = latency
        self._api_key = api_key
        self._strict = strict
        # Guards every attribute a user's thread may wait for; held for a few instructions only.
        self._changed = threading.Condition()
        self._faults: list[BaseException] = []
        self._wanted_port = port
        self._port: int | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stop: socket.socket | None = None

    @property
    def url(self) -> str:
        """The base URL for clients, `http://127.0.0.1:PORT/v1`."""
        if self._port is None:
            raise RuntimeError("the endpoint has no address before it is started")
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def answers_left(self) -> int:
        """The number of answers of the script that nobody has asked for."""
        return len(self._script)

    def start(self) -> Self:
        """Start to listen; does nothing if the endpoint listens already.

        Raises:
            EndpointError: It could not listen.
            RuntimeError: It was closed; make a new one.
        """
        if self._thread is not None:
            if self._stop is None:
                raise RuntimeError("a closed endpoint cannot be started again")
            return self
        stop, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(stop,), name="fractal-endpoint", daemon=True)
        self._thread.start()
        _started.add(self)
        if not self._ready.wait(_START_LIMIT) or self._port is None:
            self.close()
            raise EndpointError("the endpoint did not start")
        return self

    def close(self) -> None:
        """Close every connection and end the thread; does nothing the second time.

        Raises:
            EndpointError: The answers raised, or the thread did not end because an answer function blocks.
        """
        if self._thread is None or self._stop is None:
            return
        # The other end of the pair becomes readable. A call into the loop would do as well, but it waits
        # for the loop, and so without a bound for an answer function that blocks it.
        self._stop.close()
        self._stop = None
        _started.discard(self)
        self._thread.join(_STOP_LIMIT)
        if self._thread.is_alive():
            raise EndpointError(f"the endpoint did not stop within {_STOP_LIMIT:g} seconds")
        if self._faults:
            first, *others = self._faults
            cause = BaseExceptionGroup("several answers failed", self._faults) if others else first
            raise EndpointError(f"the endpoint failed: {repr_of(first)}") from cause

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            self.close()
        except EndpointError as error:
            if exc is None:
                raise
            # What failed in the test is likely its consequence, and must not be hidden by it.
            exc.add_note(str(error))

    def wait_for_requests(self, n: int, timeout: float = 5) -> None:
        """Block until `n` requests have arrived in all.

        Raises:
            TimeoutError: There were fewer after `timeout` seconds.
        """
        self._wait(lambda: len(self.requests), lambda count: count >= n, timeout, f"{n} requests")

    def wait_for_disconnects(self, n: int, timeout: float = 5) -> None:
        """Block until the clients of `n` requests have gone away before their answer was sent.

        Raises:
            TimeoutError: There were fewer after `timeout` seconds.
        """
        self._wait(lambda: self.disconnects, lambda count: count >= n, timeout, f"{n} disconnects")

    def wait_until_closed(self, timeout: float = 5) -> None:
        """Block until no connection is open.

        Raises:
            TimeoutError: There still was one after `timeout` seconds.
        """
        self._wait(lambda: self.connections, lambda count: count == 0, timeout, "no open connection")

    def _wait(self, count: Callable[[], int], enough: Callable[[int], bool], timeout: float, what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: enough(count()), timeout):
                raise TimeoutError(f"waited {timeout:g} seconds for {what}, there are {count()}")

    def _read(self, given: Answers) -> _Source:
        if given is None:
            given = "ok"
        if isinstance(given, Answer | str | ToolCallAnswer):
            constant = as_answer(given)
            return lambda _: constant
        if callable(given):
            function = given
            return lambda request: as_answer(function(request))
        self._script.extend(as_answer(each) for each in given)
        return self._next_of_script

    def _next_of_script(self, request: RecordedRequest) -> Answer:
        if self._script:
            return self._script.popleft()
        return _answers.failure(400, "the script has no answer left", code="script_exhausted")

    def _run(self, stop: socket.socket) -> None:
        try:
            with stop:
                anyio.run(self._serve, stop, backend="asyncio")
        except BaseException as error:  # a thread has no caller to raise to; `close` raises it
            self._faults.append(error)
        finally:
            self._ready.set()

    async def _serve(self, stop: socket.socket) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self._wanted_port)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._converse)
            self._port = listener.extra(anyio.abc.SocketAttribute.local_port)
            self._ready.set()
            await anyio.wait_readable(stop)
            tasks.cancel_scope.cancel()

    async def _converse(self, stream: anyio.abc.SocketStream) -> None:
        with self._changed:
            self.connections += 1
            self.connections_opened += 1
        try:
            async with stream:
                connection = Connection(stream)
                while (request := await connection.next_request()) is not None:
                    await self._respond(connection, request)
        finally:
            with self._changed:
                self.connections -= 1
                self._changed.notify_all()

    async def _respond(self, connection: Connection, request: RecordedRequest) -> None:
        with self._in_flight(request):
            reply = self._reply(request)
            if not await connection.unless_gone(partial(connection.send, reply)):
                self.disconnects += 1

    @contextmanager
    def _in_flight(self, request: RecordedRequest) -> Generator[None, None, None]:
        with self._changed:
            self.requests.append(request)
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.in_flight -= 1
                self._changed.notify_all()

    def _reply(self, request: RecordedRequest) -> ReadyReply:
        try:
            return ready_reply(self._answer(request), request)
        except Exception as error:
            self._faults.append(error)
            # Without the header OpenAI's clients retry, and call the broken function again.
            header = {"x-should-retry": "false"}
            return ready_reply(_answers.failure(500, f"no answer: {repr_of(error)}", headers=header), request)

    def _answer(self, request: RecordedRequest) -> Answer:
        if self._api_key is not None and not _carries(request, self._api_key):
            return _answers.failure(401, "wrong or missing API key", code="invalid_api_key")
        if request.method == "GET" and request.path.endswith("/models"):
            return _MODELS
        if request.method != "POST" or not request.path.endswith("/chat/completions"):
            return _answers.failure(404, f"no such path: {request.method} {request.path}", code="not_found")
        if not request.body:
            return _answers.failure(400, "the body is not a JSON object", code="invalid_json")
        if self._strict:
            try:
                check_messages(request.body.get("messages"))
            except ValueError as fault:
                return _answers.failure(400, str(fault), code="invalid_messages")
        answer = self._source(request)
        return replace(answer, delay=answer.delay + self._latency)


def _carries(request: RecordedRequest, key: str) -> bool:
    bearer = request.headers.get("authorization")
    return bearer == f"Bearer {key}" or request.headers.get("api-key") == key


_MODELS = _answers.raw(
    json.dumps(
        {
            "object": "list",
            "data": [{"id": "test-model", "object": "model", "created": 0, "owned_by": "test"}],
        }
    ),
    content_type="application/json",
)
