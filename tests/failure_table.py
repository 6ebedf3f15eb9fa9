"""Writes docs/failures.md: ways for a run to fall apart, and what each rank then says.

python -m tests.failure_table                     # all cases, some minutes
python -m tests.failure_table "killed"            # those whose names hold this, on the terminal
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator, Sequence

import torch
from rich.progress import track

from tests.support.deadly_failures import DEADLY, deadly
from tests.support.failure_cases import LIMIT, RANKS, Case, Told
from tests.support.living_failures import LIVING, living
from tests.support.ports import free_port
from tests.support.process_ranks import spawn
from tests.support.repository import ROOT

PATH = ROOT / "docs" / "failures.md"
MARK = "## The table\n"
BOUND = 300.0


def rows(page: str) -> list[str]:
    """The cases that a page lists, in order."""
    return re.findall(r"^### (.*)$", page.partition(MARK)[2], flags=re.MULTILINE)


def measured(words: Sequence[str]) -> Iterator[tuple[Case, dict[int, Told]]]:
    """Each case whose name holds one of `words`, and what the surviving ranks say of it."""
    chosen = [i for i, case in enumerate(LIVING) if any(word in case.name for word in words)]
    if chosen:
        outcomes = spawn(living, RANKS, tuple(chosen), timeout=BOUND)
        assert not (errors := [o.error for o in outcomes if o.error]), errors[0]
        for position, number in enumerate(chosen):
            said = {r: o.result[position] for r, o in enumerate(outcomes) if o.result is not None}
            yield LIVING[number], said
    deaths = [i for i, case in enumerate(DEADLY) if any(word in case.name for word in words)]
    for number in track(deaths, "ranks die"):
        outcomes = spawn(deadly, RANKS, number, free_port(), timeout=BOUND)
        yield DEADLY[number], {r: o.result for r, o in enumerate(outcomes) if o.result is not None}


def entry(case: Case, said: dict[int, Told]) -> str:
    """The entry of a case: what each rank said, after how many seconds."""
    lines = [f"### {case.name}", ""]
    if case.victim is not None:
        lines += [f"Rank {case.victim} dies, stops or ends.", ""]
    for rank, told in sorted(said.items()):
        lines += [f"Rank {rank}, after {told.seconds:.1f} s:", "", *_quoted(told.text), ""]
    after = [told.after for told in said.values() if told.after is not None]
    if after:
        lines += [f"The next batch: loss and gradients differ from one device by at most {max(after):.0e}.", ""]
    return "\n".join(lines)


def _quoted(text: str) -> list[str]:
    text = re.sub(r"/[\w./-]*/((?:ringpass|passes|tests|gloo)/[\w./-]+)", r"\1", text)  # paths of this machine
    text = re.sub(r"127\.0\.0\.1\]?:\d+", "127.0.0.1:port", " ".join(text.split()))
    return [f"    {line}" for line in textwrap.wrap(text, 116)]


def entries(page: str) -> dict[str, str]:
    """The entries of a page, by case."""
    parts = re.split(r"^### (.*)$", page.partition(MARK)[2], flags=re.MULTILINE)
    return {name: f"### {name}{text}" for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def main() -> None:
    """Runs the cases, prints what the ranks say, and writes it to the page, in whose table the other cases stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", default=[""])
    page = PATH.read_text()
    found = entries(page)
    for case, said in measured(parser.parse_args().words):
        found[case.name] = entry(case, said)
        print(found[case.name], flush=True)
    of = f"Three ranks on one host, gloo, torch {torch.__version__.split('+')[0]}, `timeout` {LIMIT:g} s"
    listed = [found[case.name].rstrip() for case in (*LIVING, *DEADLY) if case.name in found]
    head = f"{page.partition(MARK)[0]}{MARK}\n{of}; seconds from the start of the step.\n\n"
    PATH.write_text(head + "\n\n".join(listed) + "\n")


if __name__ == "__main__":
    main()
