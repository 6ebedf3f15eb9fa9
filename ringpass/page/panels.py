"""The panels of the page, in their order: what each shows, and what to look for, in plain words."""

from __future__ import annotations

from typing import NamedTuple


class Panel(NamedTuple):
    """A panel: its name in the page, its title, and a text above it, in which `[term]` has the glossary's tooltip."""

    name: str
    title: str
    about: str


PANELS = (
    Panel(
        "verdict",
        "Verdict",
        "What to know before a run: whether it fits, what it costs, and the one thing to change.",
    ),
    Panel(
        "tokens",
        "Who holds which tokens",
        "Each sequence is cut into pieces, and each rank holds some: this is its [layout]. Look for a rank with "
        "far more or fewer tokens than the others. Ops on single tokens then need no communication.",
    ),
    Panel(
        "sites",
        "Attention sites",
        "A [site] is one attention call of the model; equal ones are one row. Look for a [balance] well above 1, "
        "and for more bytes received than needed. Choose a row to see its tiles below.",
    ),
    Panel(
        "tiles",
        "Tile map",
        "Rows are queries, columns are keys. A [tile] is computed by the rank that holds its queries; hatched "
        "parts are neither computed nor sent. Choose a rank, by a click or the arrow keys, to see its tiles step "
        "by step. Look for a rank with more colour in its rows than others.",
    ),
    Panel(
        "exchanges",
        "Exchanges",
        "Which rank sends keys and values to which, in a forward. In each [step] a rank sends to one rank and "
        "receives from one. Look for single dark cells: a message that all others wait for.",
    ),
    Panel(
        "timeline",
        "Timeline",
        "What each rank does in the forward of one attention: tiles, transfers, waits. A [transfer] costs time "
        "only where no tile runs beside it: look for waits, and for the rank that ends last. Planned times are "
        "estimates.",
    ),
    Panel(
        "code",
        "The program, stage by stage",
        "Two stages of the compiler side by side: the model's lines, the captured graph, one rank's program, its "
        "forward and backward. Choose a line: what comes from the same line of the model is marked in both. "
        "Marked lines at the edge were added, removed or replaced between the two.",
    ),
    Panel(
        "gathers",
        "Gathers",
        "An op that mixes tokens in a way that no rule covers makes a [gather]: every rank then holds and "
        "computes all of it. This is the list to work off: each has the line of the model, and what avoids it.",
    ),
    Panel(
        "boundaries",
        "Boundaries",
        "Where else ranks communicate: sums over tokens, gradients of parameters, tokens that move to another "
        "[layout]. Look for large values of which a layer has many.",
    ),
    Panel(
        "memory",
        "Memory of a rank",
        "Bytes alive on a rank while its program runs, forward then backward. The peak is what must fit the "
        "device. Look for what is saved for the backward: checkpointing or more ranks reduce it.",
    ),
    Panel(
        "alternatives",
        "What else was weighed",
        "The estimated times of the layouts and of the ways in which an attention can run; the chosen one is "
        "first. With no described [machine] the choice is made by work and bytes alone.",
    ),
    Panel(
        "about",
        "Proof, versions, how to reproduce",
        "What was proved of the schedules of all ranks before anything was sent, and what a bug report needs.",
    ),
)
