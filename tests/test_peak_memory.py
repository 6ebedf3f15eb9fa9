"""The measurement of peak memory that the memory bound and the main job rely on."""

from __future__ import annotations

import torch

from benchmarks.memory import Allocation, _peak, peak_bytes

MIB = 2**20


def block(mib: int = 1) -> torch.Tensor:
    return torch.zeros(mib * MIB, dtype=torch.uint8)


def test_the_peak_is_of_what_lives_at_once() -> None:
    def step() -> None:
        first = block(4)
        del first
        second, third = block(2), block(3)
        del second, third

    assert 5 * MIB <= peak_bytes(step) < 5.1 * MIB


def test_what_lived_before_is_not_counted_even_where_it_is_freed() -> None:
    before = [block(8)]

    def step() -> None:
        before.clear()
        block(2)

    assert 2 * MIB <= peak_bytes(step) < 2.1 * MIB


def test_an_earlier_measurement_leaves_no_trace() -> None:
    held: list[torch.Tensor] = []
    peak_bytes(lambda: held.append(block(8)))

    def step() -> None:
        held.clear()
        block(2)

    assert 2 * MIB <= peak_bytes(step) < 2.1 * MIB
    assert 2 * MIB <= peak_bytes(lambda: block(2)) < 2.1 * MIB


def test_an_address_given_out_again_was_freed_out_of_sight() -> None:
    assert _peak([Allocation(0, 64, 4), Allocation(1, 64, 3), Allocation(2, 128, 2)], kept=set()) == 5


def test_kept_tensors_are_not_counted() -> None:
    weight = torch.nn.Parameter(torch.ones(512, 512))
    x = torch.ones(2, 512)
    counted = peak_bytes(lambda: (x @ weight).sum().backward())
    weight.grad = None
    without = peak_bytes(lambda: (x @ weight).sum().backward(), kept=lambda: [weight.grad])
    assert counted >= MIB
    assert without < 0.1 * MIB


def test_a_step_that_allocates_nothing_has_no_peak() -> None:
    assert peak_bytes(lambda: None) == 0
