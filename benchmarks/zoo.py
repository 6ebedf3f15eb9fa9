"""Public models on gloo ranks beside one device: docs/zoo.md.

    python -m benchmarks.zoo                          # every entry, both ways of attention
    python -m benchmarks.zoo --only gpt2,bert --ranks 3

For each: the largest relative error of any output, loss or gradient (forward and backward, length 23), attentions on
the ring, what is gathered, the share of the FLOPs of linear layers and convolutions on local tokens, and the peak of a
step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.support.process_ranks import Workers
from tests.support.zoo import ZOO
from tests.support.zoo_parity import LENGTH, Report, local_fraction, zoo_parity

DOCUMENT = Path(__file__).parent.parent / "docs" / "zoo.md"
HEAD = """# The zoo

Small, randomly initialised models of public classes ({length} tokens, 2 layers, batch of 2, with labels, in
training mode), sharded over {ranks} gloo ranks and compared with eager PyTorch on one device. Made by `python -m
benchmarks.zoo`; `pytest tests/models/test_zoo.py -m slow` runs the same in evaluation, without labels, with
padding (of one row at its end, of the other at its beginning), and over 3 ranks; `-k inductor`, with `-m slow`, runs
each model once with code generation.

*error*: the largest relative error of any output, the loss, or the gradient of any parameter, in float64; in
float32 where marked \\*, because an op of the model has no float64 version. *on the ring*: the number of attentions
that run as ring attention. *gathers*: values that had to be gathered in the forward, outputs excepted, and their
bytes. *local*: the fraction of the FLOPs of linear layers and convolutions that runs on local tokens; layers that
work on one vector per picture (its step and class, in DiT and SD3) run on every rank, and so do Moonshine's strided
convolutions, which make tokens of the wave, the patches of CogVideoX, cut before its frames are one sequence, and in
SAM 2 the patches, which overlap, and the first layer, whose windows are not a sequence yet: in models this small, much
of the work. *peak*: the peak memory of a rank in the second step, forward and backward, without parameters and their
gradients, against one device in eager mode; in models this small, most of it does not depend on tokens. It is left out
where it has not been measured. Qwen2.5-VL cuts the patches of a batch apart by data: its graph breaks there, and where
the lengths of the parts are symbolic, a layer after they are joined gathers them.

| model | attention | error | on the ring | gathers | local | peak, KiB |
| --- | --- | --- | --- | --- | --- | --- |
"""
FOOT = """
Not built: the Llama of litgpt and of torchtitan, because neither package is among those that the tests install; and
Mamba-2 on its own, which has no attention and so nothing to shard.
"""


def row(name: str, attention: str, reports: list[Report]) -> str:
    """One line of the table."""
    report = max(reports, key=lambda r: r.error)
    size = sum(g.bytes for g in report.gathers)
    reasons = ", ".join(dict.fromkeys(g.reason for g in report.gathers))
    gathers = f"{len(report.gathers)} ({size:,} bytes): {reasons}" if report.gathers else "none"
    star = "" if ZOO[name].dtype.itemsize == 8 else "\\*"
    sites = str(report.sites) if report.sites else "none: every rank computes all"
    local = f"{local_fraction(reports):.1%}" if report.sites else ""
    peak = f"{max(r.peak for r in reports) / 1024:,.0f} of {report.whole_peak / 1024:,.0f}"
    return f"| {name} | {attention} | {report.error:.0e}{star} | {sites} | {gathers} | {local} | {peak} |"


def main() -> None:
    """Prints the table, and writes it where it is whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ZOO)
    rows = []
    with Workers(ranks=args.ranks) as workers:
        for name in names:
            for attention in ZOO[name].attentions if not ZOO[name].missing else ():
                reports = workers.run(zoo_parity, args.ranks, name, attention, memory=True)
                rows.append(row(name, attention, reports))
                print(rows[-1], flush=True)
    missing = [f"{name} ({ZOO[name].missing})" for name in names if ZOO[name].missing]
    rows += [f"\nNot run, since the package was not installed: {', '.join(missing)}."] if missing else []
    if not args.only:
        DOCUMENT.write_text(HEAD.format(length=LENGTH, ranks=args.ranks) + "\n".join(rows) + "\n" + FOOT)


if __name__ == "__main__":
    main()
