"""The bytes of a report are those that ranks receive, forward and backward, in attention and at boundaries."""

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
    {"comm": "allgather"},
    {"layout": "contiguous", "dilation": "auto"},
]


@pytest.mark.parametrize(
    ("name", "ranks", "length", "options"),
    [
        ("gpt2", 2, 23, {}),
        ("llama", 3, 23, {"unroll_limit": 0}),
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
        if found["split"]:  # collectives of attention: at run time they look like those of boundaries
            totals = [{phase: sum(of.values()) for phase, of in found[x].items()} for x in ("explained", "counted")]
            assert totals[0] == totals[1]
        else:
            assert found["explained"] == found["counted"]
        assert found["counted"]["backward"]
        if not found["split"] and not options.get("ulysses_degree"):
            assert found["planned"] == found["counted"]["forward"].get(ATTENTION, 0)


def test_every_op_that_talks_to_ranks_has_a_rule() -> None:
    assert {*ops.COMMUNICATING, *pooling.BUFFERED, gradient_sums.start_sum} == {*RULES, pooling.start_all_to_all}
