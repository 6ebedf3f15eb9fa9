"""Operators that hand the state of a recurrence from the rank of one chunk to the rank of a later one.

    token = begin_states([a, b, ..])            values that enter, one element of each is enough
    token, = send_states([token, state], dst)   on the rank that has the state
    token, state = receive_states(token, ..)    on the rank that needs it
    out = end_states(out, token)                the values that leave

The `token` is one element without meaning.  It leads from what enters to what leaves through every transfer, so that on
each rank autograd reaches all of them, in the reverse order, and no compiler drops or reorders one.  The backward of a
send is a receive, and that of a receive a send; `begin_states` and `end_states` are each other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass.comm import p2p
from ringpass.ops.library import Context, define, differentiate, implement, unchanged

TAG = 2
"""Of all messages: a pair's transfers are matched by their order."""
LABEL = "transfer of a recurrence's state"

define("begin_states(Tensor[] entering) -> Tensor")
define("send_states(Tensor[] states, int dst, str group) -> Tensor")
define("receive_states(Tensor token, int[] shape, ScalarType dtype, int src, str group) -> Tensor[]")
define("end_states(Tensor out, Tensor token) -> Tensor")

begin_states = torch.ops.ringpass.begin_states.default
send_states = torch.ops.ringpass.send_states.default
receive_states = torch.ops.ringpass.receive_states.default
end_states = torch.ops.ringpass.end_states.default


def _token(like: Tensor) -> Tensor:
    """A token: in float32, which carries gradients."""
    return like.new_zeros(1, dtype=torch.float32)


def _send(states: list[Tensor], dst: int, group: str) -> Tensor:
    token, state = states
    message = state.contiguous().view(-1)
    p2p.start(message, dst, message, None, TAG, group, LABEL).wait()
    return _token(token)


def _receive(token: Tensor, shape: Sequence[int], dtype: torch.dtype, src: int, group: str) -> list[Tensor]:
    state = token.new_empty(shape, dtype=dtype)
    message = state.view(-1)
    p2p.start(message, None, message, src, TAG, group, LABEL).wait()
    return [_token(token), state]


def _fake_receive(token: Tensor, shape: Sequence[int], dtype: torch.dtype, *args: Any) -> list[Tensor]:
    return [_token(token), token.new_empty(shape, dtype=dtype)]


implement("begin_states", lambda entering: _token(entering[0]), lambda entering: _token(entering[0]))
implement("send_states", _send, lambda states, *args: _token(states[0]))
implement("receive_states", _receive, _fake_receive)
implement(
    "end_states",
    lambda out, token: out.clone(memory_format=torch.contiguous_format),
    lambda out, token: torch.empty_like(out, memory_format=torch.contiguous_format),
)


def _save_begin(ctx: Context, inputs: tuple[Any, ...], output: object) -> None:
    ctx.arguments = tuple((x.shape, x.dtype) for x in inputs[0])


def _begin_backward(ctx: Context, grad: Tensor) -> list[Tensor]:
    return [end_states(grad.new_zeros(shape, dtype=dtype), grad) for shape, dtype in ctx.arguments]


def _save_send(ctx: Context, inputs: tuple[Any, ...], output: object) -> None:
    (_, state), *where = inputs
    ctx.arguments = list(state.shape), state.dtype, *where


def _send_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    return receive_states(grad, *ctx.arguments), None, None


def _receive_backward(ctx: Context, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    shape, dtype, *where = ctx.arguments
    token, state = grads
    assert token is not None
    state = token.new_zeros(shape, dtype=dtype) if state is None else state
    return send_states([token, state], *where), *unchanged(ctx)


def _save_receive(ctx: Context, inputs: tuple[Any, ...], output: object) -> None:
    ctx.arguments = inputs[1:]


differentiate("begin_states", _begin_backward, _save_begin)
differentiate("send_states", _send_backward, _save_send)
differentiate("receive_states", _receive_backward, _save_receive)
differentiate("end_states", lambda ctx, grad: (grad, begin_states([grad])), lambda ctx, inputs, output: None)
