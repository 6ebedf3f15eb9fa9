"""Writes docs/operators.md: what each op of torch's database does with tokens of other ranks.

    python -m tests.op_table                     # all ops, some 20 minutes
    python -m tests.op_table softmax sum         # these, on the terminal

Each sample of an op is partitioned over 2 and 3 simulated ranks along each of its dims, and its numbers are compared
with those of one device.  A dim along which tokens do not depend on each other (tried by changing them one at a time)
should be local; the last line of the table says of how many ops that is so.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from torch.testing._internal.opinfo.core import OpInfo

from tests.support.op_database import (
    Outcome,
    Sample,
    Untraceable,
    check,
    draws,
    name_of,
    operators,
    samples,
    separable,
    sequence_dims,
)

PATH = Path(__file__).parents[1] / "docs" / "operators.md"
WORLDS = (2, 3)
WORDS = {
    Outcome.LOCAL: "local", Outcome.FEW: "moves few tokens", Outcome.REDUCED: "reduced",
    Outcome.MOVED: "all-to-all", Outcome.GATHERED: "gathered",
}  # fmt: skip
HEAD = f"""# What each operator does with tokens of other ranks

Every entry of torch's own database of operators (`op_db`, torch {torch.__version__.split("+")[0]}), each dim of its
samples in turn the sequence, on 2 and 3 simulated ranks, forward and gradients, against one device. The numbers count
dims of samples. `python -m tests.op_table` rewrites this page; `pytest -m slow tests/passes/test_op_database.py` checks
all of it, the default run a part.

- *local*: each rank works on its own tokens.
- *moves few tokens*: halos, single tokens.
- *reduced*: partial results are combined over ranks.
- *all-to-all*: each rank works on all tokens of its part of another dim.
- *gathered*: every rank works on all tokens; a warning names the op, and `strict=True` refuses it.

*Own tokens* says along how many dims tokens do not depend on each other, and along how many of these the op is local.

"""


@dataclass
class Row:
    """How often an op had each outcome; along how many dims its tokens are independent, and it is local."""

    name: str
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    separable: int = 0
    local: int = 0
    remark: str = ""

    def __str__(self) -> str:
        counts = [str(self.outcomes[o] or "") for o in Outcome]
        own = f"{self.local} of {self.separable}" if self.separable else ""
        return f"| {' | '.join([f'`{self.name}`', *counts, own, self.remark])} |"


def cases(op: OpInfo, most: int) -> Iterator[tuple[Sample, int, int, int]]:
    """(sample, operand, dim, number of ranks) of what is tried.  Raises Untraceable."""
    for sample in samples(op, most):
        sample.captured()
        for world in WORLDS:
            for operand, dim in sequence_dims(sample, world):
                yield sample, operand, dim, world


def row_of(op: OpInfo, most: int, worlds: tuple[int, ...] = WORLDS) -> Row:
    """Tries an op.  Raises AssertionError where a number is wrong."""
    row = Row(name_of(op))
    try:
        for sample, operand, dim, world in cases(op, most):
            if world in worlds:
                done = check(sample, operand, dim, "contiguous", world)
                row.outcomes[done] += 1
                if not draws(sample) and separable(sample, operand, dim):
                    row.separable += 1
                    row.local += done is Outcome.LOCAL
    except Untraceable as error:
        row.remark = f"no graph of fixed sizes: {str(error).splitlines()[0].split(':')[0]}"
    if not row.outcomes and not row.remark:
        row.remark = "no tensor with a dim of tokens"
    return row


def summary(rows: list[Row]) -> str:
    """How many of the ops with independent tokens are local along every such dim."""
    having = [row for row in rows if row.separable]
    local = [row for row in having if row.local == row.separable]
    return f"{len(rows)} entries; of {len(having)} with own tokens, {len(local)} are local along all such dims"


def main() -> None:
    """Tries the named ops, or all, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    chosen = [op for op in operators() if not args.names or name_of(op) in args.names]
    rows = [row_of(op, args.samples) for op in track(chosen, "ops")]
    rows.sort(key=lambda row: row.name)
    titles = ["op", *(WORDS[o] for o in Outcome), "own tokens", ""]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *map(str, rows), "", summary(rows)]
    text = "\n".join(lines)
    if args.names:
        print(text)
    else:
        PATH.write_text(HEAD + text + ".\n")
        print(f"{PATH.name}: {summary(rows)}")


if __name__ == "__main__":
    main()
