"""How somebody is asked whether a call may be made, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from fractal._copies import copied, copied_arguments, is_untouched
from fractal._engine.explain import explain
from fractal._functions.schema import ArgumentsFault
from fractal._json import is_list, is_mapping, text_of
from fractal._texts import repr_of
from fractal.approval import Allow, Defer, Deny, PendingCall
from fractal.events import ApprovalAnswered, ApprovalRequested

if TYPE_CHECKING:
    from fractal._engine.call import Call
    from fractal._engine.step import BoundCall
    from fractal.events import Event

__all__ = ["allowed", "is_approved"]


async def is_approved(call: Call) -> bool:
    """Ask the approver whether a call may be made, and with what arguments; end the call if not."""
    bound = call.bound
    await _tell(call, ApprovalRequested)
    answer = await (_answer(call) if call.journaled is None else call.journaled.approval(call, _answer))
    if isinstance(answer, Defer):
        await _defer(call)
        return False
    if isinstance(answer, Allow) and answer.arguments is not None:
        try:
            call.bound = allowed(bound, answer.arguments)
        except ArgumentsFault as fault:
            answer = Deny(f"it was approved with other arguments, which do not fit: {fault}")
    # Not by the reason alone: somebody may deny without one.
    reason = text_of(answer.reason or Deny().reason) if isinstance(answer, Deny) else None
    await _tell(call, ApprovalAnswered, is_allowed=reason is None, reason=reason)
    if reason is not None:
        call.end("denied", error=f"denied: {reason}")
        return False
    call.needs_approval = False
    call.started = call.run.clock.now()
    return True


async def _defer(call: Call) -> None:
    """End a call whose approver answers later; without a journal nothing could take it up again."""
    await _tell(call, ApprovalAnswered, is_allowed=False, reason="deferred")
    if call.journaled is None:
        call.run.emitter.warn(
            f"approve() has deferred tool {call.bound.name!r}: only calls of a model can wait, in a run with journal="
        )
        call.end("denied", error="denied: its approval was deferred, and it cannot wait for that")
    else:
        call.end("skipped", error="not called yet: it waits for approval")


async def _tell(call: Call, kind: type[Event], **facts: Any) -> None:
    bound = call.bound
    emitter = call.run.emitter
    if emitter.has_listeners:
        arguments = copied_arguments(bound.arguments)
        await emitter.emit_in_turn(kind, tool_name=bound.name, call_id=bound.call_id, arguments=arguments, **facts)


async def _answer(call: Call) -> Allow | Deny | Defer:
    """The approver's answer; a call without an approver, or whose approver fails, is denied."""
    run, bound = call.run, call.bound
    assert bound.tool is not None
    if run.approve is None:
        run.emitter.warn(f"tool {bound.name!r} requires approval and there is nobody to ask: pass approve=")
        return Deny("there is nobody to approve it")
    arguments = copied_arguments(bound.arguments)
    pending = PendingCall(
        tool_name=bound.name,
        call_id=bound.call_id,
        arguments=arguments,
        description=bound.tool.description,
        is_interrupted=call.journaled is not None and call.journaled.is_interrupted,
    )
    context = run.context(tool_name=bound.name, call_id=bound.call_id)
    context.started()
    try:
        answer = await run.approve(pending, context, run.emitter.warn)
    except Exception as error:
        call.exception = error
        return Deny(f"it could not be approved: {explain(error)}")
    if isinstance(answer, bool):
        return Allow() if answer else Deny()
    if isinstance(answer, (Allow, Deny, Defer)):
        return answer
    run.emitter.warn(
        f"approve() answered {repr_of(answer)} for tool {bound.name!r}: return Allow(…), Deny(…), Defer(), True or"
        " False"
    )
    return Deny("the approval was not understood")


def allowed(bound: BoundCall, given: object) -> BoundCall:
    """The call with the arguments that the approver has allowed; the same object if they are unchanged.

    What was shown has been converted. Handed back as it was it is not converted again; of what was changed, only the
    changes are.

    Args:
        bound: The call as it was shown.
        given: The arguments, by name.

    Raises:
        ArgumentsFault: They do not fit.
    """
    assert bound.tool is not None
    if not is_mapping(given):
        raise ArgumentsFault(f"a call takes arguments by name, not {type(given).__name__}")
    parameters = bound.tool.parameters
    names = {shown: name for name, shown in parameters.shown_names.items() if shown not in parameters.shown_names}
    sent, was = parameters.sent(bound.sent), bound.arguments
    known: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for key, value in given.items():
        name = names.get(key, key)
        if name in was and is_untouched(value, was[name]):
            known[name] = was[name]
        else:
            shown = parameters.shown_names.get(name, name)
            changed[shown] = _as_sent(copied(value), was.get(name, _MISSING), sent.get(shown, _MISSING))
    if not changed and known.keys() == was.keys():
        return bound
    arguments = parameters.check_beside(known, changed)
    left_out = {parameters.shown_names.get(name, name) for name in was.keys() - known.keys()}
    kept = {name: value for name, value in sent.items() if name not in left_out}
    return replace(bound, arguments=arguments, sent={**kept, **changed})


_MISSING: Any = object()


def _as_sent(value: Any, was: Any, sent: Any) -> Any:
    """A changed value, with its unchanged parts in the form that the model sent, before conversion."""
    if is_untouched(value, was):
        return sent
    if is_mapping(value) and is_mapping(was) and is_mapping(sent):
        return {
            name: _as_sent(each, was[name], sent[name]) if name in was and name in sent else each
            for name, each in value.items()
        }
    if _is_sequence(value) and _is_sequence(was) and is_list(sent) and len(was) == len(sent):
        return _items_as_sent(value, was, sent)
    return value


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _items_as_sent(value: Sequence[Any], was: Sequence[Any], sent: Sequence[Any]) -> list[Any]:
    """A changed list, with its unchanged items in the form that the model sent; items may be new, gone or moved."""
    shorter = min(len(value), len(was))
    front = next((i for i in range(shorter) if not is_untouched(value[i], was[i])), shorter)
    moved = len(was) - len(value)
    items: list[Any] = []
    for i, each in enumerate(value):
        before = [j for j in dict.fromkeys((i, i + moved)) if 0 <= j < len(was)]
        if i < front:
            before = [i]
        same = next((j for j in before if is_untouched(each, was[j])), None)
        if same is not None:
            items.append(sent[same])
        else:
            items.append(_as_sent(each, was[i], sent[i]) if i < len(was) else each)
    return items
