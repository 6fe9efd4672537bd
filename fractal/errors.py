"""What can go wrong, as types.

```text
FractalError
├── UserError                    wrong use: raised at once, never a result
│   ├── InvalidArguments         (TypeError) an argument that cannot be what was meant
│   ├── InvalidTool              (TypeError) a function that cannot be a tool
│   ├── ToolNameTaken            (ValueError) two tools of one name
│   ├── InvalidMessages          (ValueError) a history that no endpoint would accept
│   ├── PriceUnknown             (LookupError) a limit in money, and a model without a price
│   ├── ClientBoundToLoop        (RuntimeError) an HTTP client that cannot follow to a second event loop
│   ├── SyncInAsyncError         (RuntimeError) a blocking call where it would wait for itself
│   ├── PortalClosed             (RuntimeError) a blocking call on an event loop whose block has been left
│   ├── OtherProcess             (RuntimeError) a forked child waits for what runs in its parent
│   └── JournalError             (RuntimeError) a durable run cannot go on with its journal
│       ├── JournalMismatch      it records something else than the run does now
│       ├── JournalUnreadable    it is damaged, or of a newer version
│       ├── JournalNotWritten    nothing can be written: full disk, no permission
│       ├── RunInProgress        another process, or task, is at work on the run
│       ├── RunTakenOver         another process went on with the run
│       ├── RunUnknown           (LookupError) it has no such run
│       └── NotPending           (LookupError) an answer for a call that does not wait for one
├── StoreError                   what is kept on disk or in a database: raised, never a result
│   ├── ConversationConflict     somebody else has gone on with a conversation
│   ├── ConversationNotFound     (LookupError) there is no conversation with that id
│   ├── ConversationExists       (ValueError) there is one with that id already
│   ├── StoreUnavailable         it cannot be reached, read or written now
│   └── StoreUnreadable          it is damaged, of a newer version, or something else
├── StorageFailed                a root besides: of Journal… and StoreUnreadable, JournalNotWritten, StoreUnavailable
├── AnswerRejected               raised by an output validator of yours: the model is told why, and asked again
└── RunError                     why a run did not succeed: in `AgentResult`, raised by `raise_for_error()`
    ├── ModelError               the endpoint
    │   ├── MissingCredentials   no key and no client
    │   ├── ConnectionFailed     it could not be reached, or hung up
    │   ├── RequestTimedOut      it did not answer in time
    │   ├── BadReply             it answered something that is not a chat completion
    │   │   └── ReplyTooLarge    it answered more than `ReplyBounds` allow
    │   ├── AllModelsFailed      none of several models gave an answer
    │   └── StatusError          it answered with an HTTP error
    │       ├── AuthenticationFailed   401, 403
    │       ├── ContentFiltered        its filter does not let the request through
    │       ├── RateLimited            429
    │       └── ServerError            408, 409, 5xx
    ├── Refused                  the model declined
    ├── GuardRaised              a guard of yours stopped the run
    ├── NoContent                the model kept answering nothing
    ├── InvalidOutput            the model kept giving answers that do not fit the output type
    ├── ToolFailed               a tool with `on_error="raise"` raised
    ├── ToolInterrupted          a process ended while a tool was at work: unknown whether it took effect
    ├── ApprovalPending          calls wait for the answer of somebody who has deferred it
    ├── ToolErrors               (ExceptionGroup) several failures at once: two such tools in one reply
    ├── ToolIgnoredCancellation  a tool went on after its grace; raised out of the run, with `on_stubborn="raise"`
    ├── DelegateFailed           an agent asked as a tool gave no answer
    ├── LimitReached             a limit of ours
    │   ├── DeadlineExceeded     the run's time is over
    │   ├── DeadlineWouldPass    a necessary wait does not fit into the time left
    │   ├── IterationsExceeded   too many turns
    │   ├── BudgetExceeded       requests, tool calls or tokens are spent
    │   ├── ContextWindowExceeded  what a request cannot do without is longer than the context window
    │   └── DepthExceeded        too many delegations inside each other
    ├── RunCancelled             someone cancelled the run (only where cancellation is not an exception of the loop)
    └── UnexpectedError          anything else; the original is `__cause__`
```

Facts are attributes, the text says what to do next, and every error survives pickling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from fractal._texts import said_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fractal.approval import PendingCall

__all__ = [
    "AllModelsFailed",
    "AnswerRejected",
    "ApprovalPending",
    "AuthenticationFailed",
    "BadReply",
    "BudgetExceeded",
    "ClientBoundToLoop",
    "ConnectionFailed",
    "ContentFiltered",
    "ContextWindowExceeded",
    "ConversationConflict",
    "ConversationExists",
    "ConversationNotFound",
    "DeadlineExceeded",
    "DeadlineWouldPass",
    "DelegateFailed",
    "DepthExceeded",
    "FractalError",
    "GuardRaised",
    "InvalidArguments",
    "InvalidMessages",
    "InvalidOutput",
    "InvalidTool",
    "IterationsExceeded",
    "JournalError",
    "JournalMismatch",
    "JournalNotWritten",
    "JournalUnreadable",
    "LimitReached",
    "MissingCredentials",
    "ModelError",
    "NoContent",
    "NotPending",
    "OtherProcess",
    "PortalClosed",
    "PriceUnknown",
    "RateLimited",
    "Refused",
    "ReplyTooLarge",
    "RequestTimedOut",
    "RunCancelled",
    "RunError",
    "RunInProgress",
    "RunTakenOver",
    "RunUnknown",
    "ServerError",
    "StatusError",
    "StopReason",
    "StorageFailed",
    "StoreError",
    "StoreUnavailable",
    "StoreUnreadable",
    "SyncInAsyncError",
    "ToolErrors",
    "ToolFailed",
    "ToolIgnoredCancellation",
    "ToolInterrupted",
    "ToolNameTaken",
    "UnexpectedError",
    "UserError",
]

StopReason = Literal[
    "finished",
    "terminated",
    "soft_deadline",
    "refusal",
    "guard",
    "no_content",
    "invalid_output",
    "max_iterations",
    "deadline",
    "budget",
    "context_window",
    "depth",
    "model_error",
    "tool_error",
    "approval",
    "cancelled",
    "error",
]
"""Why a run ended: the model's last word (`finished`), a terminating tool (`terminated`), the answer asked for
when time ran short (`soft_deadline`), or what cut it."""

SUCCESSES: frozenset[StopReason] = frozenset({"finished", "terminated", "soft_deadline"})
"""Stop reasons of runs that gave an answer."""


def _rebuild(kind: type[FractalError], args: tuple[Any, ...]) -> FractalError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class FractalError(Exception):
    """The root: `except FractalError` catches everything this package raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., FractalError], tuple[Any, ...], dict[str, Any]]:
        return _rebuild, (type(self), self.args), dict(self.__dict__)


class UserError(FractalError):
    """The package was used in a way that cannot work; raised at once."""


class InvalidArguments(UserError, TypeError):
    """An argument of a public function has the wrong type or shape."""


class InvalidTool(UserError, TypeError):
    """A function cannot be offered to a model as it is.

    Attributes:
        tool_name: Name under which it was to be registered.
        fault: What is in the way.
    """

    def __init__(self, tool_name: str, fault: str) -> None:
        self.tool_name, self.fault = tool_name, fault
        super().__init__(f"{tool_name!r} cannot be a tool: {fault}")


class ToolNameTaken(UserError, ValueError):
    """Two tools would have one name, and the model could not tell them apart.

    Attributes:
        tool_name: The name.
    """

    def __init__(self, tool_name: str) -> None:
        self.tool_name = tool_name
        super().__init__(
            f"there is a tool called {tool_name!r} already: give this one another name=, or replace=True to take its"
            " place"
        )


class InvalidMessages(UserError, ValueError):
    """A message history that an endpoint would refuse.

    Attributes:
        index: Position of the faulty message in the list.
        fault: What is wrong with it.
    """

    def __init__(self, index: int, fault: str) -> None:
        self.index, self.fault = index, fault
        super().__init__(f"messages[{index}]: {fault}")


class PriceUnknown(UserError, LookupError):
    """A budget in money was given, and a model has no price, so that nobody can hold it.

    Attributes:
        model: Name of the model.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(
            f"max_cost needs the price of the model {model!r}: give prices={{{model!r}: Price(…)}}, or install the"
            " extra 'cost', which knows the prices of many"
        )


class ClientBoundToLoop(UserError, RuntimeError):
    """A client with an HTTP client of its own was used from a second event loop."""

    def __init__(self, client: str) -> None:
        self.client = client
        super().__init__(
            f"this {client} was made with its own http_client, whose connections belong to the event loop that used"
            " it first. Make one agent (or one client) per loop, or leave http_client= out: then every loop gets"
            " its own connections by itself"
        )


class SyncInAsyncError(UserError, RuntimeError):
    """A blocking call was made on the very event loop that would have to answer it."""


class PortalClosed(UserError, RuntimeError):
    """A blocking call was made on an event loop of which the block, `with sync.portal()`, has been left.

    Attributes:
        backend: What the event loop ran on.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        super().__init__(
            f"the block of this {backend} portal has been left, and its event loop has ended: make the call inside the"
            " block, or outside of a context that was copied in it"
        )


class OtherProcess(UserError, RuntimeError):
    """A forked child waits for what runs in its parent.

    Attributes:
        pid: Id of the process in which it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        super().__init__(
            f"this runs in process {pid}, from which this one was forked: wait for it there, or make the call again in"
            " this one"
        )


class StoreError(FractalError):
    """Something is not kept, or cannot be read again.

    Attributes:
        result: Of a run that could not keep what it has said: its `AgentResult`, with all of that; else None.
    """

    result: Any = None


class ConversationConflict(StoreError):
    """Somebody else has gone on with a conversation, or has deleted it, since it was read; nothing was written.

    Attributes:
        conversation_id: Its id.
        expected: The revision that was read; 0 for a conversation that there was not yet.
        found: The revision that there is now; 0 if there is none.
    """

    def __init__(self, conversation_id: str, expected: int, found: int) -> None:
        self.conversation_id, self.expected, self.found = conversation_id, expected, found
        super().__init__(
            f"conversation {conversation_id!r} was read at revision {expected}, and is now at revision {found}: await"
            " its reload(), and ask again, or append() what was said to another one"
        )


class ConversationNotFound(StoreError, LookupError):
    """There is no conversation with that id.

    Attributes:
        conversation_id: The id.
    """

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        super().__init__(f"there is no conversation {conversation_id!r}")


class ConversationExists(StoreError, ValueError):
    """A conversation was to get an id that another one has.

    Attributes:
        conversation_id: The id.
    """

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        super().__init__(f"there is a conversation {conversation_id!r} already: give another id, or delete that one")


class StorageFailed(FractalError):
    """A root besides of what files and databases do wrong, for journals and conversations alike."""


class _AboutStore(Exception):
    def __init__(self, store: str, reason: str) -> None:
        self.store, self.reason = store, reason
        super().__init__(f"{store}: {reason}")


class StoreUnavailable(_AboutStore, StoreError, StorageFailed):
    """A store cannot be reached, read or written now: it is locked, full, read-only or away. Nothing was torn.

    Attributes:
        store: Which: a path, or the kind of database.
        reason: What is in the way.
    """


class StoreUnreadable(_AboutStore, StoreError, StorageFailed):
    """A store is damaged, of a newer version, or something else: `reason` says what, and `store` says which."""


class JournalError(UserError, RuntimeError):
    """A durable run cannot go on with its journal; raised out of the run, which can be taken up again.

    Attributes:
        run_id: Id of the run; None where it is about all of the journal.
    """

    def __init__(self, message: str, *, run_id: str | None = None) -> None:
        self.run_id = run_id
        super().__init__(message)


class JournalMismatch(JournalError):
    """A journal records something else of a step than the run does now: another input, another tool or arguments.

    Attributes:
        step: The step, by its position in the run.
        recorded: What the journal has.
        now: What the run does.
    """

    def __init__(self, run_id: str, step: str, recorded: str, now: str) -> None:
        self.step, self.recorded, self.now = step, recorded, now
        super().__init__(
            f"run {run_id!r} does something else at step {step!r} than its journal records: recorded was {recorded};"
            f" now it is {now}. Go on with the code and the input it began with, or begin anew with another run_id",
            run_id=run_id,
        )


class JournalUnreadable(JournalError, StorageFailed):
    """A journal, or a record in it, is damaged, of a newer version, or none."""


class JournalNotWritten(JournalError, StorageFailed):
    """A journal could not be written: the disk is full, the file may not be written, or others keep it locked."""


class RunInProgress(JournalError):
    """Another process, or another task of this one, is at work on the run.

    Attributes:
        owner: Who that is.
    """

    def __init__(self, run_id: str, owner: str) -> None:
        self.owner = owner
        super().__init__(f"run {run_id!r} is in progress: {owner} is at work on it", run_id=run_id)


class RunTakenOver(JournalError):
    """Another process has gone on with the run, since this one gave no sign of life for too long."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"run {run_id!r} was taken over: this process gave no sign of life for longer than its lease", run_id=run_id
        )


class RunUnknown(JournalError, LookupError):
    """A journal has no run of that id."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"the journal has no run {run_id!r}", run_id=run_id)


class NotPending(JournalError, LookupError):
    """An answer was given for a call that does not wait for one: it was never issued, or has been answered.

    Attributes:
        call_id: Id of the call.
    """

    def __init__(self, run_id: str, call_id: str, pending: Sequence[str]) -> None:
        self.call_id = call_id
        waiting = ", ".join(map(repr, pending)) or "none"
        super().__init__(
            f"call {call_id!r} of run {run_id!r} does not wait for an answer; those that do: {waiting}", run_id=run_id
        )


class AnswerRejected(FractalError):
    """An output validator does not accept the model's answer: the model is told why, and asked again.

    Args:
        reason: What is wrong with the answer, in words for the model.

    Attributes:
        reason: The same.

    Example:
        >>> def no_empty_lists(output: list[str]) -> None:
        ...     if not output:
        ...         raise AnswerRejected("give at least one")
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RunError(FractalError):
    """The reason why a run did not succeed.

    Attributes:
        result: The run's `AgentResult` with all it had done so far, once there is one.
    """

    stop_reason: ClassVar[StopReason] = "error"
    error_type: ClassVar[str] = "unexpected_error"
    result: Any = None


class ModelError(RunError):
    """The endpoint did not give a usable answer.

    Attributes:
        status: HTTP status, or None if there was no HTTP answer.
        code: The endpoint's own error code, such as `"insufficient_quota"`, or None.
        param: The request field the endpoint complains of, or None.
        request_id: The endpoint's id of the request, or None.
        retryable: Whether the same request may succeed later.
        retry_after: Seconds the endpoint asked us to wait, or None if it did not say.
    """

    stop_reason: ClassVar[StopReason] = "model_error"
    error_type = "api_error"
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status, self.code, self.param = status, code, param
        self.request_id, self.retry_after = request_id, retry_after
        super().__init__(message)


class MissingCredentials(ModelError):
    """There is no client and no key to make one with."""


class ConnectionFailed(ModelError):
    """The endpoint could not be reached, or closed the connection before the answer was whole."""

    retryable = True


class RequestTimedOut(ModelError):
    """The endpoint did not answer within the time one request may take."""

    error_type = "timeout"
    retryable = True


class BadReply(ModelError):
    """The endpoint answered, but not with a chat completion: HTML, half a body, a missing field."""

    error_type = "json_decode_error"
    retryable = True


class ReplyTooLarge(BadReply):
    """The endpoint answered more than the model's `ReplyBounds` allow; reading ended where the bound is.

    Attributes:
        what: Field of `ReplyBounds` that was passed, such as `"body"`.
        bound: Its value.
    """

    retryable = False

    def __init__(self, what: str, bound: int) -> None:
        self.what, self.bound = what, bound
        super().__init__(f"the answer is too large: {what} over {bound:,}; OpenAIModel(bounds=ReplyBounds({what}=…))")


class AllModelsFailed(ModelError):
    """None of the models of a `FallbackModel` or a `RaceModel` gave a usable answer.

    It can be asked again if that may help with one of them, after the shortest wait that one of those asked for.

    Attributes:
        errors: Why each did not, in the order of the models: a `ModelError`, or a limit of the run.
    """

    def __init__(self, errors: Sequence[RunError]) -> None:
        self.errors = tuple(errors)
        reasons = "; ".join(f"({number}) {said_by(error)}" for number, error in enumerate(self.errors, 1))
        again = [error for error in self.errors if isinstance(error, ModelError) and error.retryable]
        waits = [error.retry_after for error in again if error.retry_after is not None]
        super().__init__(
            f"none of {len(self.errors)} models answered: {reasons}",
            # One that asked for no wait at all need not wait for the others.
            retry_after=min(waits) if waits and len(waits) == len(again) else None,
        )
        self.retryable = bool(again)


_REFUSALS = frozenset({400, 404, 405, 406, 415, 422, 500, 501})
# What these say is said of something else than the form of a request.
_NO_REFUSALS = frozenset(
    {
        "content_filter",
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "model_not_found",
        "not_found_error",
        "string_above_max_length",
    }
)


class StatusError(ModelError):
    """The endpoint answered with an HTTP error; `status`, `code` and the text are its own."""

    @property
    def is_refusal(self) -> bool:
        """Whether the endpoint, by status and code, may not take requests of this form."""
        is_busy = self.status == 500 and self.retry_after is not None
        return self.status in _REFUSALS and self.code not in _NO_REFUSALS and not is_busy

    @property
    def names(self) -> frozenset[str]:
        """The names in `param`, such as `messages` and `content` in `messages.[1].content`."""
        return frozenset(re.findall(r"[a-zA-Z_]+", self.param or ""))


class AuthenticationFailed(StatusError):
    """The endpoint does not accept the key (401) or does not allow this (403)."""


class ContentFiltered(StatusError):
    """The endpoint's filter did not let the request through; the text says what it says of it."""

    stop_reason: ClassVar[StopReason] = "refusal"
    error_type = "refusal"


class RateLimited(StatusError):
    """The endpoint asked us to slow down (429), or says that the account's quota is used up."""

    error_type = "rate_limit"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message, **facts)
        # A used-up quota is a 429 too, and waiting does not help then.
        self.retryable = self.code != "insufficient_quota"


class ServerError(StatusError):
    """The endpoint failed or is overloaded (5xx), gave up waiting (408), or met a conflict (409)."""

    retryable = True


class Refused(RunError):
    """The model declined to answer; the text is its reason."""

    stop_reason = "refusal"
    error_type = "refusal"


class GuardRaised(RunError):
    """A guard stopped the run: what it raised is `__cause__`.

    Attributes:
        guard: Name of the guard.
        reason: What it raised, as text.
    """

    stop_reason = "guard"
    error_type = "guard"

    def __init__(self, guard: str, reason: str) -> None:
        self.guard, self.reason = guard, reason
        super().__init__(f"guard {guard!r} stopped the run: {reason}")


RAISE_LIMIT = "raise max_tokens, or lower reasoning_effort"


class NoContent(RunError):
    """The model answered nothing, again and again, or its reply was cut at the token limit before it said anything.

    Attributes:
        replies: How many empty replies there were.
        is_cut: Whether the last one was cut at the token limit; asked again, it would be cut there again.
        held: What the last one held that is no text, such as `image_url` or `audio`.
    """

    stop_reason = "no_content"
    error_type = "no_content_after_retries"

    def __init__(self, replies: int, *, is_cut: bool = False, held: Sequence[str] = ()) -> None:
        self.replies, self.is_cut, self.held = replies, is_cut, tuple(held)
        only = f", only what is not read as an answer: {', '.join(held)}" if held else ""
        super().__init__(
            f"the reply was cut at the token limit before it said anything: {RAISE_LIMIT}"
            if is_cut
            else f"the model gave {replies} empty replies: no text and no tool call{only}"
        )


class InvalidOutput(RunError):
    """The model's answers did not fit the output type, or were rejected, again and again.

    Attributes:
        attempts: How many answers there were.
        fault: What is wrong with the last one.
        answer: The last one, as the model wrote it.
    """

    stop_reason = "invalid_output"
    error_type = "json_decode_error"

    def __init__(self, attempts: int, fault: str, answer: str) -> None:
        self.attempts, self.fault, self.answer = attempts, fault, answer
        answers = "1 answer" if attempts == 1 else f"{attempts} answers"
        super().__init__(f"the model gave {answers}, and none is valid; the last one: {fault}")


class ToolFailed(RunError):
    """A tool with `on_error="raise"` raised; the original is `__cause__`.

    Attributes:
        tool_name: The tool's name.
    """

    stop_reason = "tool_error"

    def __init__(self, tool_name: str, message: str) -> None:
        self.tool_name = tool_name
        super().__init__(f"tool {tool_name!r} failed: {message}")


class ToolErrors(RunError, ExceptionGroup[RunError]):
    """Several tool calls of one reply failed in different ways, all of which are kept.

    A group, so that `except* ToolFailed` finds every failed tool whether there is one or more. Its text has a line for
    each member.

    Args:
        errors: Two or more, in call order: `ToolFailed` for a tool with `on_error="raise"`, `BudgetExceeded` for
            calls that were not made any more, `UnexpectedError` for an output validator that failed.

    Example:
        >>> try:
        ...     raise ToolErrors([ToolFailed("search", "offline"), ToolFailed("charge", "card declined")])
        ... except* ToolFailed as group:
        ...     [error.tool_name for error in group.exceptions]
        ['search', 'charge']
    """

    stop_reason = "tool_error"

    def __new__(cls, errors: Sequence[RunError]) -> Self:
        """Make the group; a group takes its members here."""
        return super().__new__(cls, f"{len(errors)} failures at once", errors)

    def __init__(self, errors: Sequence[RunError]) -> None:
        self.args = (tuple(errors),)  # what pickling makes it from

    def derive(self, errors: Sequence[RunError], /) -> ToolErrors:  # type: ignore[override]
        """A group of some of the members, for `split`, `subgroup` and `except*`."""
        part = ToolErrors(errors)
        part.result = self.result
        return part

    def __str__(self) -> str:
        return "\n- ".join((f"{self.message}:", *map(str, self.exceptions)))


class ToolIgnoredCancellation(RunError):
    """An async tool was cancelled and did not stop; with `Limits(on_stubborn="raise")` the run went on without it.

    It is raised out of the run, and of the runs above, in place of a result or of a cancellation: something is still
    at work that nobody waits for.

    Attributes:
        tool_name: The tool's name.
        where: Where it is stuck, as `file.py:12 in function`; None if no line of a user's own is known.
        grace: Seconds it had.
        call_id: Id of its call, or None.
        through: The tool of the run that ended without it that waits for it, if that is another: a delegate, say.
    """

    stop_reason = "tool_error"

    def __init__(
        self,
        tool_name: str,
        where: str | None,
        grace: float,
        *,
        call_id: str | None = None,
        through: str | None = None,
    ) -> None:
        self.tool_name, self.where, self.grace, self.call_id, self.through = tool_name, where, grace, call_id, through
        stuck = f", stuck at {where}" if where else ""
        called = f", called through {through!r}," if through else ""
        super().__init__(
            f"tool {tool_name!r}{called} has not stopped {grace:g} s after it was cancelled{stuck}; the run ended"
            " without it. Let it pass the cancellation on, or give it more time: Limits(grace=…)"
        )


class ToolInterrupted(RunError):
    """A process ended while a tool was at work, so that nobody knows whether it took effect.

    Attributes:
        tool_name: The tool.
    """

    stop_reason = "tool_error"

    def __init__(self, tool_name: str) -> None:
        self.tool_name = tool_name
        super().__init__("the process ended while the tool was at work: it is unknown whether it took effect")


class ApprovalPending(RunError):
    """Calls wait for the answer of somebody who has deferred it: `agent.resume(journal, run_id, answers=…)` gives it.

    Attributes:
        pending: The calls.
    """

    stop_reason = "approval"
    error_type = "approval_pending"

    def __init__(self, pending: Sequence[PendingCall]) -> None:
        self.pending = tuple(pending)
        names = ", ".join(call.tool_name for call in self.pending[:10])
        super().__init__(f"{len(self.pending)} calls wait for approval: {names}")


class DelegateFailed(RunError):
    """An agent that was asked as a tool ended without an answer; the text is what the asking model is told.

    Attributes:
        agent_name: The agent that was asked.
    """

    stop_reason = "tool_error"

    def __init__(self, agent_name: str, message: str) -> None:
        self.agent_name = agent_name
        super().__init__(message)


class LimitReached(RunError):
    """A limit that the caller set ended the run."""


class DeadlineExceeded(LimitReached):
    """The run's time was over.

    Attributes:
        seconds: The time it had.
        waited_for: What its request was waiting for then, before it could be sent; None if it was not.
    """

    stop_reason = "deadline"
    error_type = "timeout"

    def __init__(self, seconds: float, waited_for: str | None = None) -> None:
        self.seconds, self.waited_for = seconds, waited_for
        at_last = f"; at last it waited for {waited_for}" if waited_for else ""
        super().__init__(f"the run did not finish within {seconds:g} s{at_last}")


class DeadlineWouldPass(LimitReached):
    """Something had to be waited for longer than there was time left, so the run gave up at once.

    Attributes:
        what: What takes so long.
        wait: Seconds the wait would have taken.
        remaining: Seconds there were.
    """

    stop_reason = "deadline"
    error_type = "timeout"

    def __init__(self, what: str, wait: float, remaining: float) -> None:
        self.what, self.wait, self.remaining = what, wait, remaining
        super().__init__(f"{what} would take {wait:.3g} s, and {max(remaining, 0):.3g} s are left of the run's time")


class IterationsExceeded(LimitReached):
    """The model still wanted to go on after the last turn it was allowed.

    Attributes:
        limit: Turns allowed.
    """

    stop_reason = "max_iterations"
    error_type = "max_iterations_reached"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"no final answer after {limit} iterations: raise max_iterations, or look for a tool loop")


class BudgetExceeded(LimitReached):
    """A budget of the run, or of a run above it, is spent.

    Attributes:
        resource: `"requests"`, `"tool_calls"`, `"tokens"` or `"cost"`.
        limit: What was allowed; of cost, in the currency of the prices.
        used: What is used or reserved already, in the same.
    """

    stop_reason = "budget"
    error_type = "budget_exceeded"

    def __init__(self, resource: str, limit: float, used: float) -> None:
        self.resource, self.limit, self.used = resource, limit, used
        words = f"{limit:.0f} {resource.replace('_', ' ')}" if resource != "cost" else f"{limit:.10g} in money"
        super().__init__(f"the budget of {words} is spent ({used:.10g} used or reserved, over the whole tree)")


class ContextWindowExceeded(LimitReached):
    """The parts that a request cannot do without are longer than the context window.

    That is all of the request but the transcript, and of the transcript the system messages at its start, the
    question, and the newest message with what belongs to it.

    Attributes:
        needed: Tokens it would take, as they are counted.
        limit: Tokens there are.
    """

    stop_reason = "context_window"
    error_type = "context_window_exceeded"

    def __init__(self, needed: int, limit: int) -> None:
        self.needed, self.limit = needed, limit
        super().__init__(
            f"system prompt, tools, room for the reply, the question and the newest messages alone take {needed} tokens"
            f" of a context window of {limit}: raise context_window, lower max_tokens, or send less"
        )


class DepthExceeded(LimitReached):
    """Agents delegate to agents deeper than allowed.

    Attributes:
        limit: Levels allowed below the first run.
    """

    stop_reason = "depth"
    error_type = "depth_exceeded"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"delegation is {limit} levels deep already: raise Limits.max_depth if that is meant")


class RunCancelled(RunError):
    """The run was cancelled, and whoever awaits it was not, so there is no answer; `result` has what was done.

    It was cancelled from another thread, or the run above it has ended.
    """

    stop_reason = "cancelled"
    error_type = "cancelled"

    def __init__(self, message: str = "the run was cancelled") -> None:
        super().__init__(message)


class UnexpectedError(RunError):
    """Something failed that is neither the endpoint nor a tool: the original is `__cause__`."""
