"""docs/bad_input.md is the table of the cases that the tests run."""

from __future__ import annotations

from tests.bad_input.all_cases import CASES, PAGE, SECTIONS, page
from tests.bad_input.options import CALLS, OPTIONS
from tests.bad_input.rank_cases import ONE_DEVICE


def test_the_page_is_the_table_of_the_cases() -> None:
    assert page() == PAGE.read_text(), "run python -m tests.bad_input.all_cases"


def test_there_are_enough_cases() -> None:
    assert len(CASES) == sum(map(len, SECTIONS.values()))  # no two cases have one name
    assert len(CASES) + len(OPTIONS) + len(CALLS) >= 150


def test_no_case_ends_in_a_bare_error_of_ringpass() -> None:
    """What is neither like one device nor an error of ringpass is an error of torch's own, with torch's words."""
    torch_says = {case.said for case in CASES.values() if case.outcome not in (ONE_DEVICE, "SelectiveCheckpointError")}
    assert {case.outcome for case in CASES.values()}.isdisjoint({"AssertionError", "KeyError", "ZeroDivisionError"})
    assert all(torch_says)
