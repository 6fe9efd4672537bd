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

from fractal.errors._base import (
    SUCCESSES as SUCCESSES,
    AnswerRejected as AnswerRejected,
    ClientBoundToLoop as ClientBoundToLoop,
    FractalError as FractalError,
    InvalidArguments as InvalidArguments,
    InvalidMessages as InvalidMessages,
    InvalidTool as InvalidTool,
    OtherProcess as OtherProcess,
    PortalClosed as PortalClosed,
    PriceUnknown as PriceUnknown,
    RunError as RunError,
    StopReason as StopReason,
    SyncInAsyncError as SyncInAsyncError,
    ToolNameTaken as ToolNameTaken,
    UserError as UserError,
)
from fractal.errors._models import (
    AllModelsFailed as AllModelsFailed,
    AuthenticationFailed as AuthenticationFailed,
    BadReply as BadReply,
    ConnectionFailed as ConnectionFailed,
    ContentFiltered as ContentFiltered,
    MissingCredentials as MissingCredentials,
    ModelError as ModelError,
    RateLimited as RateLimited,
    ReplyTooLarge as ReplyTooLarge,
    RequestTimedOut as RequestTimedOut,
    ServerError as ServerError,
    StatusError as StatusError,
)
from fractal.errors._runs import (
    RAISE_LIMIT as RAISE_LIMIT,
    ApprovalPending as ApprovalPending,
    BudgetExceeded as BudgetExceeded,
    ContextWindowExceeded as ContextWindowExceeded,
    DeadlineExceeded as DeadlineExceeded,
    DeadlineWouldPass as DeadlineWouldPass,
    DelegateFailed as DelegateFailed,
    DepthExceeded as DepthExceeded,
    GuardRaised as GuardRaised,
    InvalidOutput as InvalidOutput,
    IterationsExceeded as IterationsExceeded,
    LimitReached as LimitReached,
    NoContent as NoContent,
    Refused as Refused,
    RunCancelled as RunCancelled,
    ToolErrors as ToolErrors,
    ToolFailed as ToolFailed,
    ToolIgnoredCancellation as ToolIgnoredCancellation,
    ToolInterrupted as ToolInterrupted,
    UnexpectedError as UnexpectedError,
)
from fractal.errors._stored import (
    ConversationConflict as ConversationConflict,
    ConversationExists as ConversationExists,
    ConversationNotFound as ConversationNotFound,
    JournalError as JournalError,
    JournalMismatch as JournalMismatch,
    JournalNotWritten as JournalNotWritten,
    JournalUnreadable as JournalUnreadable,
    NotPending as NotPending,
    RunInProgress as RunInProgress,
    RunTakenOver as RunTakenOver,
    RunUnknown as RunUnknown,
    StorageFailed as StorageFailed,
    StoreError as StoreError,
    StoreUnavailable as StoreUnavailable,
    StoreUnreadable as StoreUnreadable,
)

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


def _stand_here() -> None:
    """Let all errors be of this module, whatever file they are in: tracebacks and pickles say its name."""
    for error in list(globals().values()):
        if isinstance(error, type):
            error.__module__ = __name__


_stand_here()
