"""The tree of errors, what each carries, and the public names of the package."""

import ast
import copy
import functools
import inspect
import itertools
import pickle
import re
import types
from pathlib import Path
from typing import Any, get_args

import pytest

import fractal
from fractal import AgentResult, PendingCall, _names, errors
from fractal.errors import FractalError, ModelError, RunError, StopReason, UserError

FACTS: dict[str, Any] = {"status": 429, "code": "c", "param": "p", "request_id": "r", "retry_after": 1.5}

SAMPLES: list[FractalError] = [
    errors.FractalError("text"),
    errors.UserError("text"),
    errors.InvalidArguments("text"),
    errors.InvalidTool("search", "no good"),
    errors.ToolNameTaken("search"),
    errors.InvalidMessages(3, "no role"),
    errors.PriceUnknown("gpt"),
    errors.ClientBoundToLoop("AsyncOpenAI"),
    errors.SyncInAsyncError("text"),
    errors.PortalClosed("trio"),
    errors.OtherProcess(4711),
    errors.StoreError("text"),
    errors.ConversationConflict("trip", 3, 4),
    errors.ConversationNotFound("trip"),
    errors.ConversationExists("trip"),
    errors.StoreUnavailable("talks.db", "the disk is full"),
    errors.StoreUnreadable("talks.db", "it is no database"),
    errors.StorageFailed("text"),
    errors.AnswerRejected("too short"),
    errors.RunError("text"),
    errors.ModelError("text", **FACTS),
    errors.MissingCredentials("text"),
    errors.ConnectionFailed("text", **FACTS),
    errors.RequestTimedOut("text", **FACTS),
    errors.BadReply("text", **FACTS),
    errors.ReplyTooLarge("calls", 1000),
    errors.AllModelsFailed([errors.RateLimited("text", **FACTS), errors.DeadlineWouldPass("waiting", 9.0, 1.5)]),
    errors.StatusError("text", **FACTS),
    errors.AuthenticationFailed("text", **FACTS),
    errors.ContentFiltered("text", **FACTS),
    errors.RateLimited("text", **FACTS),
    errors.ServerError("text", **FACTS),
    errors.Refused("I will not"),
    errors.GuardRaised("no_secrets", "ValueError: a key"),
    errors.NoContent(4),
    errors.InvalidOutput(3, "'age' is missing", '{"name": "Ada"}'),
    errors.ToolFailed("search", "ValueError: no"),
    errors.ToolErrors([errors.ToolFailed("search", "no"), errors.BudgetExceeded("tool_calls", 2, 2)]),
    errors.ToolIgnoredCancellation("search", "app.py:12 in search", 1.5),
    errors.ToolInterrupted("search"),
    errors.ApprovalPending([PendingCall(tool_name="pay", call_id="1", arguments={"order": 1}, description="Pay.")]),
    errors.DelegateFailed("Guide", "agent 'Guide' gave no answer"),
    errors.LimitReached("text"),
    errors.DeadlineExceeded(2.5),
    errors.DeadlineWouldPass("waiting", 9.0, 1.5),
    errors.IterationsExceeded(10),
    errors.BudgetExceeded("tool_calls", 2, 2),
    errors.ContextWindowExceeded(5000, 4096),
    errors.DepthExceeded(8),
    errors.RunCancelled(),
    errors.JournalError("text", run_id="one"),
    errors.JournalMismatch("one", "1.0 started", "search", "look"),
    errors.JournalUnreadable("text"),
    errors.JournalNotWritten("text", run_id="one"),
    errors.RunInProgress("one", "process 7"),
    errors.RunTakenOver("one"),
    errors.RunUnknown("one"),
    errors.NotPending("one", "call_1", ["call_2"]),
    errors.UnexpectedError("text"),
]
CLASSES = [type(sample) for sample in SAMPLES]


def drawn_tree() -> list[tuple[str, str | None, str | None]]:
    """Name, parent and built-in base of each class in the drawing, from top to bottom."""
    drawing = re.search(r"```text\n(.*?)```", errors.__doc__ or "", re.DOTALL)
    assert drawing is not None
    path: list[str] = []
    tree: list[tuple[str, str | None, str | None]] = []
    for line in drawing[1].splitlines():
        found = re.fullmatch(r"([│├└─ ]*)(\w+)(?:\s{2,}(?:\((\w+)\))?.*)?", line)
        assert found is not None, line
        del path[len(found[1]) // 4 :]
        tree.append((found[2], path[-1] if path else None, found[3]))
        path.append(found[2])
    return tree


def real_classes() -> dict[str, type]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, FractalError)
    }


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    drawn = {name: parent for name, parent, _ in drawn_tree()}
    real = {
        name: next((base.__name__ for base in kind.__bases__ if issubclass(base, FractalError)), None)
        for name, kind in real_classes().items()
    }

    assert drawn == real
    assert len(drawn_tree()) == len(drawn)


@pytest.mark.parametrize(("name", "base"), [(name, base) for name, _, base in drawn_tree() if base])
def test_the_built_in_base_in_the_drawing_is_a_real_base(name: str, base: str) -> None:
    assert __builtins__[base] in getattr(errors, name).__bases__  # type: ignore[index]


def test_every_class_of_the_tree_is_tried_here_and_exported() -> None:
    assert set(real_classes().values()) == set(CLASSES)
    assert set(real_classes()) | {"StopReason"} == set(errors.__all__)
    assert set(errors.__all__) <= set(fractal.__all__)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_and_copying_with_its_text_and_facts(error: FractalError) -> None:
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*pickled, copy.copy(error), copy.deepcopy(error)):
        assert told_by(other) == told_by(error)


def told_by(value: Any) -> Any:
    """An error as values that can be compared, with the errors in it."""
    if isinstance(value, FractalError):
        return type(value), str(value), told_by(value.args), {name: told_by(fact) for name, fact in vars(value).items()}
    return [told_by(each) for each in value] if isinstance(value, tuple) else value


def test_facts_set_later_and_notes_survive_pickling_too() -> None:
    error = errors.BadReply("a page")
    error.retryable = False
    error.add_note("seen at noon")
    loaded = pickle.loads(pickle.dumps(error))

    assert loaded.retryable is False
    assert loaded.__notes__ == ["seen at noon"]


def failed() -> RunError:
    result = AgentResult(agent_name="a", success=False, error="declined")
    error = errors.Refused("declined")
    error.result, result._exception = result, error
    return error


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_an_error_and_its_result_still_know_each_other_after_copying(through: Any) -> None:
    error = through(failed())
    result = through(failed().result)

    assert result.exception.result is result
    assert error.result.exception is error


def test_an_error_with_arguments_of_its_own_can_be_subclassed_and_pickled() -> None:
    assert pickle.loads(pickle.dumps(TwoFacts(1, b="2"))).facts == (1, "2")


class TwoFacts(RunError):
    def __init__(self, a: int, *, b: str) -> None:
        self.facts = (a, b)
        super().__init__("two facts")


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if issubclass(kind, RunError)], ids=lambda kind: kind.__name__
)
def test_a_run_error_says_why_the_run_stopped(kind: type[RunError]) -> None:
    assert kind.stop_reason in get_args(StopReason)
    assert re.fullmatch(r"[a-z_]+", kind.error_type)


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if issubclass(kind, UserError)], ids=lambda kind: kind.__name__
)
def test_wrong_use_is_no_run_error(kind: type[UserError]) -> None:
    assert not issubclass(kind, RunError)


@pytest.mark.parametrize(
    ("kind", "stop_reason", "error_type"),
    [
        (errors.Refused, "refusal", "refusal"),
        (errors.GuardRaised, "guard", "guard"),
        (errors.NoContent, "no_content", "no_content_after_retries"),
        (errors.InvalidOutput, "invalid_output", "json_decode_error"),
        (errors.IterationsExceeded, "max_iterations", "max_iterations_reached"),
        (errors.RateLimited, "model_error", "rate_limit"),
        (errors.RequestTimedOut, "model_error", "timeout"),
        (errors.DeadlineExceeded, "deadline", "timeout"),
        (errors.DeadlineWouldPass, "deadline", "timeout"),
        (errors.ServerError, "model_error", "api_error"),
        (errors.StatusError, "model_error", "api_error"),
        (errors.ConnectionFailed, "model_error", "api_error"),
        (errors.AuthenticationFailed, "model_error", "api_error"),
        (errors.BadReply, "model_error", "json_decode_error"),
        (errors.ReplyTooLarge, "model_error", "json_decode_error"),
        (errors.ContentFiltered, "refusal", "refusal"),
        (errors.AllModelsFailed, "model_error", "api_error"),
        (errors.UnexpectedError, "error", "unexpected_error"),
        (errors.BudgetExceeded, "budget", "budget_exceeded"),
        (errors.ContextWindowExceeded, "context_window", "context_window_exceeded"),
        (errors.DepthExceeded, "depth", "depth_exceeded"),
        (errors.ToolFailed, "tool_error", "unexpected_error"),
        (errors.ToolErrors, "tool_error", "unexpected_error"),
        (errors.ToolIgnoredCancellation, "tool_error", "unexpected_error"),
        (errors.RunCancelled, "cancelled", "cancelled"),
    ],
)
def test_the_words_for_a_failure_are_those_of_the_contract(
    kind: type[RunError], stop_reason: str, error_type: str
) -> None:
    assert (kind.stop_reason, kind.error_type) == (stop_reason, error_type)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.InvalidTool("search", "no good"), ["'search'", "no good"]),
        (errors.ToolNameTaken("search"), ["'search'", "name="]),
        (errors.InvalidMessages(3, "no role"), ["messages[3]", "no role"]),
        (errors.ClientBoundToLoop("AsyncOpenAI"), ["AsyncOpenAI", "http_client"]),
        (errors.NoContent(4), ["4 empty"]),
        (errors.NoContent(4, held=["audio"]), ["4 empty", "audio"]),
        (errors.AnswerRejected("too short"), ["too short"]),
        (errors.InvalidOutput(3, "'age' is missing", "{}"), ["3 answers", "'age' is missing"]),
        (errors.InvalidOutput(1, "'age' is missing", "{}"), ["1 answer,"]),
        (errors.GuardRaised("no_secrets", "a key"), ["guard 'no_secrets' stopped the run: a key"]),
        (errors.ToolFailed("search", "KeyError"), ["'search'", "KeyError"]),
        (
            errors.ToolIgnoredCancellation("search", "app.py:12 in search", 1.5),
            ["'search'", "app.py:12", "1.5 s", "grace"],
        ),
        (errors.ToolIgnoredCancellation("search", None, 1), ["'search'", "cancelled; the run ended"]),
        (errors.DeadlineExceeded(2.5), ["2.5 s"]),
        (errors.DeadlineExceeded(2.5, "a free connection"), ["2.5 s; at last it waited for a free connection"]),
        (errors.DeadlineWouldPass("waiting", 9.0, -1.0), ["waiting", "9 s", "0 s are left"]),
        (errors.IterationsExceeded(10), ["10 iterations", "max_iterations"]),
        (errors.BudgetExceeded("tool_calls", 2, 1), ["2 tool calls", "1 used"]),
        (errors.BudgetExceeded("tokens", 1_234_567, 1_000_000), ["1234567 tokens"]),
        (errors.ContextWindowExceeded(5000, 4096), ["5000 tokens", "4096", "context_window"]),
        (errors.DepthExceeded(8), ["8 levels", "max_depth"]),
        (errors.AllModelsFailed([errors.BadReply("a page"), errors.ServerError("HTTP 503")]), ["2", "page", "503"]),
        (
            errors.ToolErrors([errors.ToolFailed("search", "offline"), errors.ToolFailed("charge", "declined")]),
            ["2 failures at once:", "\n- tool 'search' failed: offline", "\n- tool 'charge' failed: declined"],
        ),
    ],
    ids=str,
)
def test_the_text_names_the_facts(error: FractalError, words: list[str]) -> None:
    assert all(word in str(error) for word in words), str(error)


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (errors.ModelError("x"), False),
        (errors.MissingCredentials("x"), False),
        (errors.ConnectionFailed("x"), True),
        (errors.RequestTimedOut("x"), True),
        (errors.BadReply("x"), True),
        (errors.StatusError("x"), False),
        (errors.AuthenticationFailed("x"), False),
        (errors.RateLimited("x"), True),
        (errors.RateLimited("x", code="insufficient_quota"), False),
        (errors.ServerError("x"), True),
    ],
    ids=repr,
)
def test_a_model_error_knows_whether_asking_again_may_help(error: ModelError, retryable: bool) -> None:
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("failures", "retryable", "retry_after"),
    [
        ([errors.StatusError("x"), errors.StatusError("x")], False, None),
        ([errors.StatusError("x"), errors.ServerError("x", retry_after=9)], True, 9),
        ([errors.RateLimited("x", retry_after=9), errors.ServerError("x", retry_after=4)], True, 4),
        ([errors.RateLimited("x", retry_after=9), errors.ServerError("x")], True, None),
        ([errors.ServerError("x", retry_after=9), errors.StatusError("x", retry_after=1)], True, 9),
        ([errors.ServerError("x"), errors.DeadlineWouldPass("x", 2, 1)], True, None),
        ([errors.StatusError("x"), errors.DeadlineWouldPass("x", 2, 1)], False, None),
    ],
)
def test_failed_models_are_asked_again_if_it_may_help_with_one_and_as_soon_as_it_may(
    failures: list[RunError], retryable: bool, retry_after: float | None
) -> None:
    error = errors.AllModelsFailed(failures)
    assert (error.retryable, error.retry_after, error.errors) == (retryable, retry_after, tuple(failures))


def several() -> errors.ToolErrors:
    group = errors.ToolErrors([errors.ToolFailed("search", "offline"), errors.BudgetExceeded("tool_calls", 2, 2)])
    group.result = "the result"
    return group


def test_several_failures_are_one_run_error_and_each_can_be_caught_by_its_type() -> None:
    caught: list[BaseException] = []
    with pytest.raises(RunError, match="2 failures at once"):
        raise several()
    try:
        raise several()
    except* errors.ToolFailed as failed_tools:
        caught += failed_tools.exceptions
    except* errors.LimitReached as limits:
        caught += limits.exceptions
    assert list(map(type, caught)) == [errors.ToolFailed, errors.BudgetExceeded]


def test_a_part_of_several_failures_is_of_their_type_and_knows_their_result_and_cause() -> None:
    group = several()
    group.__cause__ = ValueError("cause")
    matching, rest = group.split(errors.ToolFailed)
    for part in (matching, rest, group.subgroup(errors.LimitReached), group.derive(group.exceptions)):
        assert type(part) is errors.ToolErrors
        assert part.result == "the result"
    assert matching is not None
    assert isinstance(matching.__cause__, ValueError)
    assert pickle.loads(pickle.dumps(matching)).exceptions[0].tool_name == "search"


# ---- the public names


def public_names() -> set[str]:
    loaded = {
        name
        for name, value in vars(_names).items()
        if not name.startswith("_") and (name == "parts" or not isinstance(value, types.ModuleType))
    }
    return loaded.union(_names._OF_TRACING)


@functools.cache
def described_aliases() -> set[str]:
    """Top-level names of the package whose assignment is followed by a text."""
    found: set[str] = set()
    for path in Path(fractal.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for statement, following in itertools.pairwise(body):
            is_text = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            if is_text and isinstance(statement, ast.Assign):
                found |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return found


def test_all_is_sorted_and_complete() -> None:
    assert fractal.__all__ == sorted(set(fractal.__all__))
    assert set(fractal.__all__) == public_names()


@pytest.mark.parametrize("name", fractal.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(fractal, name)
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert text
        assert not text.startswith(f"{value.__name__}("), "this is the text that dataclasses make up"
    else:
        assert name in described_aliases()


@pytest.mark.parametrize("kind", ["JournalUnreadable", "JournalNotWritten", "StoreUnavailable", "StoreUnreadable"])
def test_what_storage_does_wrong_has_one_root(kind: str):
    assert issubclass(getattr(errors, kind), errors.StorageFailed)


@pytest.mark.parametrize("kind", ["JournalMismatch", "RunInProgress", "NotPending", "ConversationConflict"])
def test_what_is_no_fault_of_storage_is_none(kind: str):
    assert not issubclass(getattr(errors, kind), errors.StorageFailed)
