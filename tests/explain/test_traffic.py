"""The bytes of a report are those that ranks receive: node by node, forward and backward, and of outputs in full."""

from __future__ import annotations

from typing import Any

import pytest

from ringpass import ops
from ringpass.explain.traffic import RULES
from ringpass.ops import gradient_sums, pooling
from tests.support.explained import ATTENTION, step_and_report
from tests.support.marks import slow
from tests.support.process_ranks import Workers

NAMES = ("bert", "vit", "modernbert", "qwen3", "mixtral")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"unroll_limit": 0},
    {"ulysses_degree": 2},
    {"ulysses_degree": 2, "unroll_limit": 0},
    {"comm": "allgather"},
    {"comm": "allgather", "unroll_limit": 0},
    {"layout": "contiguous", "dilation": "auto"},
]


@pytest.mark.parametrize(
    ("name", "ranks", "length", "options"),
    [
        ("gpt2", 2, 23, {}),
        slow("llama", 3, 23, {"unroll_limit": 0}),
        slow("llama", 3, 23, {}),
        slow("t5", 3, 23, {}),
        slow("gpt2", 3, 23, {}),
        slow("llama", 3, 37, {}),
        *(slow("llama", 4, 37, options) for options in OPTIONS),
        *(slow(name, ranks, 37, {}) for name in NAMES for ranks in (2, 3, 5)),
        slow("qwen3_next", 3, 37, {}),
        slow("t5", 5, 37, {"unroll_limit": 0}),
    ],
)
def test_bytes_of_a_report_are_those_at_run_time(
    workers: Workers, name: str, ranks: int, length: int, options: dict[str, Any]
) -> None:
    for found in workers.run(step_and_report, ranks, name, length, **options):
        assert found["explained"] == found["counted"]
        assert any(phase == "backward" for _, phase, _ in found["counted"])
        if not found["kinds"] & {"split", "allgather", "degree"}:
            of_keys = [n for (_, phase, at), n in found["counted"].items() if phase == "forward" and ATTENTION in at]
            assert found["planned"] == sum(of_keys)


KINDS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("halos", {}, {"halo"}),
    ("scan", {"layout": "contiguous"}, {"state"}),
    ("few_queries", {}, {"split"}),
    ("short_decoder", {}, {"split", "gather"}),
    ("frozen", {}, set()),
    ("frozen", {"ulysses_degree": 2}, {"degree"}),
    ("frozen", {"comm": "allgather"}, {"allgather"}),
]
"""A model, options, and the kinds of boundaries and of attentions that its report has."""


@pytest.mark.parametrize(
    ("name", "ranks", "options", "kinds"),
    [
        ("halos", 3, *KINDS[0][1:]),
        ("scan", 2, *KINDS[1][1:]),
        *((name, 2, options, kinds) for name, options, kinds in (*KINDS[2:4], KINDS[5])),
        *(
            slow(name, ranks, options, kinds)
            for name, options, kinds in KINDS
            for ranks in (2, 3, 4, 5)
            if ranks % options.get("ulysses_degree", 1) == 0
        ),
        *(slow(name, 3, {**options, "unroll_limit": 0}, kinds) for name, options, kinds in KINDS[:5]),
        *(slow(name, 4, {**options, "unroll_limit": 0}, kinds) for name, options, kinds in KINDS[5:]),
        *(slow(name, 3, {}, {"halo", "all-to-all"}) for name in ("bamba", "jamba", "qwen3_next")),
    ],
)
def test_bytes_of_each_kind(workers: Workers, name: str, ranks: int, options: dict[str, Any], kinds: set[str]) -> None:
    """Halos, recurrences, few queries, Ulysses, gathered keys, frozen layers: each is there, and counted exactly."""
    for found in workers.run(step_and_report, ranks, name, 37, **options):
        assert found["explained"] == found["counted"]
        assert kinds <= found["kinds"]


def test_every_op_that_talks_to_ranks_has_a_rule() -> None:
    assert {*ops.COMMUNICATING, *pooling.BUFFERED, gradient_sums.start_sum} == {*RULES, pooling.start_all_to_all}
