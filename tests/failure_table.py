"""Writes docs/failures.md: ways for a run to fall apart, and what each rank then says.

python -m tests.failure_table                     # all cases, some minutes
python -m tests.failure_table "killed"            # those whose names hold this, on the terminal
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator

import torch
from rich.progress import track

from tests.support.failure_cases import DEADLY, LIMIT, LIVING, RANKS, Case, Told, deadly, living
from tests.support.ports import free_port
from tests.support.process_ranks import spawn
from tests.support.repository import ROOT

PATH = ROOT / "docs" / "failures.md"
MARK = "## The table\n"
BOUND = 300.0


def rows(page: str) -> list[str]:
    """The cases that a page lists, in order."""
    return re.findall(r"^### (.*)$", page.partition(MARK)[2], flags=re.MULTILINE)


def measured(word: str = "") -> Iterator[tuple[Case, dict[int, Told]]]:
    """Each case whose name holds `word`, and what the surviving ranks say of it."""
    chosen = [i for i, case in enumerate(LIVING) if word in case.name]
    if chosen:
        outcomes = spawn(living, RANKS, tuple(chosen), timeout=BOUND)
        assert not (errors := [o.error for o in outcomes if o.error]), errors[0]
        for position, number in enumerate(chosen):
            said = {r: o.result[position] for r, o in enumerate(outcomes) if o.result is not None}
            yield LIVING[number], said
    deaths = [i for i, case in enumerate(DEADLY) if word in case.name]
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


def main() -> None:
    """Runs the cases, and writes the page or prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="")
    word = parser.parse_args().word
    found = []
    for case, said in measured(word):
        found.append(entry(case, said))
        print(found[-1], flush=True)
    if word:
        return
    head = PATH.read_text().partition(MARK)[0]
    of = f"Three ranks on one host, gloo, torch {torch.__version__.split('+')[0]}, `timeout` {LIMIT:g} s"
    PATH.write_text(f"{head}{MARK}\n{of}; seconds from the start of the step.\n\n" + "\n".join(found))


if __name__ == "__main__":
    main()
