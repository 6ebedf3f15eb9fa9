"""The examples of dilation: what they print is what the dense oracle counts."""

from __future__ import annotations

import re

import pytest
import torch

from examples import simulate
from ringpass.reference import multiplicity
from ringpass.schedule.dilation import Dilation
from tests.support.torchrun import torchrun


@pytest.mark.parametrize(
    "ranks, layout, lengths, rates, groups, causal",
    [
        (3, "contiguous", (16, 64), (1, 4), 2, True),
        (2, "zigzag", (12, 30), (1, 3), 4, False),
        (4, "contiguous", (64,), (1,), 1, True),
    ],
)
def test_the_simulation_counts_what_a_dense_mask_needs(
    ranks: int, layout: str, lengths: tuple[int, ...], rates: tuple[int, ...], groups: int, causal: bool
) -> None:
    """Rows in are the keys of other ranks that some head of theirs sees; with one segment, those of plain attention."""
    patterns = (
        [] if lengths == (64,) else ["--segment-lengths", *map(str, lengths), "--dilation-rates", *map(str, rates)]
    )
    asked = f"--ranks {ranks} --tokens 64 --layout {layout} --groups {groups} --mask {'causal' if causal else 'full'}"
    site = simulate.make_plan(simulate._arguments([*asked.split(), *patterns])).sites[0]
    m = multiplicity(Dilation(lengths, rates), 4, 64)
    m = m.tril() if causal else m
    assert sum(simulate.pairs_of(site, rank) for rank in range(ranks)) >= int(m.sum())
    problem = site.problem
    assert problem is not None
    read = (m > 0).view(groups, 4 // groups, 64, 64).any(1)
    sent = [x for rank in range(ranks) for x in simulate.sends(site, rank)]
    for rank in range(ranks):
        own = torch.zeros(64, dtype=torch.bool)
        for a, b in problem.query_layout.ranges(rank, 64):
            own[a:b] = True
        needed = int(read[:, own][:, :, ~own].any(1).sum())
        assert site.received(rank) == sum(x.rows for x in sent if x.dst == rank) == needed


def test_the_simulation_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    simulate.main(["--ranks", "2", "--tokens", "32", "--dilation", "auto", "--mask", "full", "--layout", "contiguous"])
    printed = capsys.readouterr().out
    assert "tokens held" in printed and "K and V of tokens" in printed and "1:17:8 of heads 1" in printed


@pytest.mark.slow
def test_dilated_training_goes_from_length_to_length() -> None:
    """Its lines, and losses that fall."""
    job = ["-m", "examples.dilated_training", "--lengths", "256", "512", "--steps", "8", "--layers", "1"]
    printed = torchrun("--nproc-per-node", "2", *job, timeout=600)
    lines = re.findall(r"^ +(\d+) tokens: (\S+) of all pairs, +(\S+) bytes .* loss (\S+) -> (\S+),", printed, re.M)
    assert [line[0] for line in lines] == ["256", "512"]
    assert float(lines[-1][4]) < float(lines[0][3]) and all(0 < float(line[1]) <= 0.25 for line in lines)
    assert all(int(line[2].replace(",", "")) > 0 for line in lines)
