"""All cases on ranks, by name, and the table of docs/bad_input.md: `python -m tests.bad_input.all_cases` writes it."""

from __future__ import annotations

from tests.bad_input.backward_uses import BACKWARD
from tests.bad_input.call_uses import CALLED
from tests.bad_input.input_values import VALUES
from tests.bad_input.inputs import INPUTS
from tests.bad_input.options import ACCEPTED, CALLS, OPTIONS
from tests.bad_input.rank_cases import ONE_DEVICE, Cases, RankCase
from tests.bad_input.transform_uses import TRANSFORMS
from tests.support.repository import ROOT

PAGE = ROOT / "docs" / "bad_input.md"
SECTIONS: dict[str, Cases] = {
    "Inputs: lengths, dtypes, kinds of tensors": INPUTS,
    "Inputs: values, masks, views and writes in place": VALUES,
    "Backward, checkpoints and hooks": BACKWARD,
    "Transforms, exports and copies": TRANSFORMS,
    "What is compiled, and where it is called": CALLED,
}
CASES: dict[str, RankCase] = {name: case for cases in SECTIONS.values() for name, case in cases.items()}
INTRODUCTION = """# Bad input and odd uses

What happens with wrong options, odd inputs and odd uses of a compiled model. Every line is a case of `tests/bad_input`:
a test runs it and compares how it ends with what stands here, and the page with the cases
(`python -m tests.bad_input.all_cases` writes it). *As one device* means: outputs and gradients of eager, or the error
that eager raises too. Each case ran with `compiler="aot_eager"` on gloo, on 1, 2 and 3 ranks unless others are named.

CUDA graphs are refused ([options.md](options.md)). `torch.export` exports the model without its ranks, as if it had not
been compiled.
"""


def page() -> str:
    """docs/bad_input.md."""
    lines = [
        INTRODUCTION,
        "## Options",
        "",
        "Each raises `OptionError`; its message matches the pattern.",
        "",
    ]
    wrong = {**{f"options=dict({text})": said for text, said in OPTIONS.items()}, **CALLS}
    lines += _table(("written", "the message says"), [(_code(text), _code(said)) for text, said in wrong.items()])
    lines += ["", "These are right:", ""]
    lines += _table(("written", "equals"), [(_code(text), _code(same)) for text, same in ACCEPTED.items()])
    for title, cases in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        lines += _table(("case", "outcome"), [(case.title, _outcome(case)) for case in cases.values()])
    return "\n".join(lines) + "\n"


def _outcome(case: RankCase) -> str:
    if case.outcome == ONE_DEVICE:
        ranks = "" if case.ranks == (1, 2, 3) else f" (on {' and '.join(map(str, case.ranks))})"
        return f"{ONE_DEVICE}{ranks}"
    alone = f"; {ONE_DEVICE} on {' and '.join(map(str, case.as_one_device))}" if case.as_one_device else ""
    return f"`{case.outcome}`: {case.said}{alone}"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---", "---"), *rows)]


if __name__ == "__main__":
    PAGE.write_text(page())
