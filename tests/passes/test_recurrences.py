"""Recurrences whose tokens stay on their ranks: states pass from the owner of a chunk to that of a later one.

On thread ranks, against one device in float64: outputs, every gradient, and the bytes that the ranks send in a forward,
which are those by which the way was chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass import ops
from ringpass.comm import p2p
from ringpass.ops import states
from ringpass.passes.partition.partitioned import Partitioned
from ringpass.passes.partition.placement_plan import PlacementPlan
from tests.support import sharded_ops, thread_ranks
from tests.support.marks import slow
from tests.support.sharded_ops import Case, check_programs, inputs, planned_programs

B, H, K, V, CHUNK = 2, 3, 2, 4, 8
S = 75  # 10 chunks, of which the last has 3 tokens
FEW = 23  # tokens of a recurrence without chunks: its graph has so many steps
Call = Callable[..., Tensor]


def shapes(tokens: int = S) -> tuple[tuple[int, ...], ...]:
    """Those of the input and of the weights that make queries and keys of it."""
    return (B, tokens, H * V), (H * V, H * K), (H * V, H * K)


def heads(x: Tensor) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D)."""
    return x.view(*x.shape[:2], H, -1).transpose(1, 2)


def chunks(x: Tensor) -> Tensor:
    """(B, S, H * D) -> (B, H, chunks, CHUNK, D), padded."""
    x = F.pad(heads(x), (0, 0, 0, -x.shape[1] % CHUNK))
    return x.reshape(*x.shape[:2], -1, CHUNK, x.shape[-1])


def tokens(x: Tensor, count: int) -> Tensor:
    """(B, H, chunks, CHUNK, D) -> (B, S, H * D)."""
    return x.flatten(2, 3)[:, :, :count].transpose(1, 2).flatten(2)


# --- recurrences ------------------------------------------------------------------------------------------------------


def delta_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The chunked delta rule: solved within chunks, outputs written in place."""
    count, (q, k, v) = q.shape[1], map(chunks, (q, F.normalize(k, dim=-1), v))
    within = (k @ k.mT).tril(-1)
    new, erased = (torch.linalg.solve_triangular(within, x, upper=False, unitriangular=True) for x in (v, k))
    state, out = q.new_zeros(B, H, K, V), torch.zeros_like(new)
    for i in range(q.shape[2]):
        written = new[:, :, i] - erased[:, :, i] @ state
        out[:, :, i] = q[:, :, i] @ state + (q[:, :, i] @ k[:, :, i].mT).tril() @ written
        state = state * 0.9 + k[:, :, i].mT @ written
    return tokens(out, count)


def two_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with a matrix and a normaliser as states; outputs stacked."""
    count, (q, k, v) = q.shape[1], map(chunks, (q.sigmoid(), k.sigmoid(), v))
    state, total = torch.zeros(B, H, K, V, dtype=v.dtype), torch.ones(B, H, 1, K, dtype=v.dtype)
    out = []
    for q_i, k_i, v_i in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        sums = total + k_i.cumsum(2)
        out.append((q_i @ state + (q_i @ k_i.mT).tril() @ v_i) / (1 + (q_i * sums).sum(-1, keepdim=True)))
        state, total = state + k_i.mT @ v_i, sums[:, :, -1:]
    return tokens(torch.stack(out, 2), count)


def by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A state that each token updates."""
    q, k, v = map(heads, (q, F.normalize(k, dim=-1), v))
    state, out = v.new_zeros(B, H, K, V), []
    for t in range(q.shape[2]):
        state = state * q[:, :, t, :, None].sigmoid() + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(out, 2).transpose(1, 2).flatten(2)


def from_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The chunks from the last to the first."""
    count, (q, k, v) = q.shape[1], map(chunks, (q, k.sigmoid(), v))
    state, out = v.new_zeros(B, H, K, V), torch.zeros_like(v)
    for i in reversed(range(q.shape[2])):
        out[:, :, i] = q[:, :, i] @ state
        state = state * 0.5 + k[:, :, i].mT @ v[:, :, i]
    return tokens(out, count)


RECURRENCES = (delta_rule, two_states, by_token, from_the_end)


def attended(mix: Call) -> Call:
    """`mix` after causal attention, with residuals."""

    def call(x: Tensor, to_q: Tensor, to_k: Tensor) -> Tensor:
        q, k = x @ to_q, x @ to_k
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(x), is_causal=True)
        x = F.rms_norm(x + y.transpose(1, 2).flatten(2), x.shape[-1:])
        return F.rms_norm(x + mix(x @ to_q, x @ to_k, x), x.shape[-1:])

    return call


def case(mix: Call, count: int | None = None) -> Case:
    """The recurrence on `count` tokens, between attention and a norm."""
    return Case("mul.Tensor", attended(mix), shapes(count or (FEW if mix is by_token else S)))


def count_of(target: Any, programs: list[Partitioned]) -> int:
    """How many calls of an op all ranks write."""
    return sum(len(p.gm.graph.find_nodes(op="call_function", target=target)) for p in programs)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", (1, 2, 3, slow(4), slow(5)))
@pytest.mark.parametrize("layout", ("contiguous", slow("zigzag")))
@pytest.mark.parametrize("mix", RECURRENCES)
def test_states_pass(mix: Call, layout: str, world: int) -> None:
    whole = case(mix)
    made = planned_programs(whole, layout, world)
    sent, received = (count_of(op, made) for op in (ops.send_states, ops.receive_states))
    assert sent == received
    assert bool(sent) == (world > 1)
    assert check_programs(whole, made) == []


@pytest.mark.parametrize("mix", (delta_rule, two_states))
def test_chunks_that_divide_the_length(mix: Call) -> None:
    """The tokens of the attention are those of the chunks; between contiguous ranks each state passes once."""
    whole = case(mix, 80)
    made = planned_programs(whole, "contiguous", 3)
    assert count_of(ops.send_states, made) == 2 * (1 + (mix is two_states))
    assert check_programs(whole, made) == []


# --- bytes ------------------------------------------------------------------------------------------------------------


def with_choices(whole: Case, layout: str, world: int) -> tuple[list[Partitioned], list[str]]:
    """Each rank's program, and what the dump says of the recurrences of a graph."""
    kept: list[list[str]] = []

    def seen(stage: str, result: object) -> None:
        if isinstance(result, PlacementPlan):
            kept.append(result.choices)

    with patch.object(sharded_ops, "verify", seen):
        made = planned_programs(whole, layout, world)
    return made, next(lines for lines in reversed(kept) if lines)


def sent_bytes(whole: Case, made: list[Partitioned]) -> tuple[int, int]:
    """(bytes of states, bytes of tokens) that all ranks together send in a forward, attention left out."""
    given, totals = inputs(whole), [0, 0]
    exchange = thread_ranks.Rendezvous._all_to_all

    def counting(sent: Tensor, dst: int | None, *args: Any) -> Any:
        totals[0] += sent.nbytes if dst is not None else 0
        return p2p.start(sent, dst, *args)

    def moving(self: Any, rank: int, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> None:
        totals[1] += (sum(sent) - sent[rank]) * (x.nbytes // max(len(x), 1))
        exchange(self, rank, out, x, received, sent)

    counted = patch.object(states, "p2p", SimpleNamespace(start=counting))
    with counted, patch.object(thread_ranks.Rendezvous, "_all_to_all", moving), torch.no_grad():
        thread_ranks.run(len(made), lambda rank, group: made[rank].gm(*given))
    return totals[0], totals[1]


@pytest.mark.parametrize("world", (2, 3))
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
@pytest.mark.parametrize("mix", (delta_rule, two_states, by_token))
def test_bytes_are_those_of_the_formula(mix: Call, layout: str, world: int) -> None:
    made, (line,) = with_choices(case(mix), layout, world)
    total, of_states, _, of_tokens, other = map(
        int, re.findall(r"moves (\d+) .*\((\d+) .* in (\d+) .*, (\d+) of tokens.* (\d+);", line)[0]
    )
    assert line.endswith("states pass") == (total < other)
    assert total == of_states + of_tokens
    assert sent_bytes(case(mix), made) == (of_states, of_tokens)


def test_state_bytes_do_not_grow_with_the_length() -> None:
    """Twice the tokens: the same states, one from each rank to the next."""
    short, long = (case(delta_rule, count) for count in (75, 150))
    sent = [sent_bytes(whole, planned_programs(whole, "contiguous", 3))[0] for whole in (short, long)]
    assert sent == [2 * B * H * K * V * 8] * 2


def test_all_to_all_where_it_moves_less() -> None:
    """Few tokens and a large state."""
    width = H * 128
    whole = Case("mul.Tensor", attended(wide_state), ((B, 32, width), (width, width), (width, width)))
    _, (line,) = with_choices(whole, "contiguous", 2)
    assert "taken: all-to-all" in line


def wide_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A state of 128 x 128 for chunks of 8 tokens."""
    count, (q, k, v) = q.shape[1], map(chunks, (q, k, v))
    state, out = v.new_zeros(B, H, 128, 128), torch.zeros_like(v)
    for i in range(q.shape[2]):
        out[:, :, i] = q[:, :, i] @ state
        state = state * 0.5 + k[:, :, i].mT @ v[:, :, i]
    return tokens(out, count)
