"""What the words of the page mean: rows of the glossary in docs/architecture.md, shown as tooltips."""

from __future__ import annotations

TERMS = {
    "replicated": "at full length, and equal on every rank",
    "gather": "make a sharded value replicated; reported if it happens inside the model",
    "axis": "a sequence with a layout: a set of aligned factors that is sharded",
    "redistribute": "move tokens from one layout to another",
    "halo": "tokens of other ranks next to a range of local tokens, fetched for ops that read neighbours",
    "sharded": "each rank holds its own tokens; its part is its shard, of local tokens",
    "layout": "which rank holds which tokens: contiguous, zigzag, striped, or made for a mask, chunk by chunk",
    "site": (
        "one attention call: as found in the graph (AttentionSite), as planned (SitePlan), as one rank runs it (Site)"
    ),
    "tile": (
        "a range of queries by a range of keys that is computed at once; full, causal, mirrored (causal with rows "
        "reversed) or partial (under its part of the mask). Empty tiles are not computed"
    ),
    "density": "of a mask: the share of all (query, key) pairs that it allows",
    "balance": "of a site: the work of the busiest rank over that of the mean one; 1 is perfect",
    "boundary": "a place of the program, outside of attention, where a rank receives something or takes part in a sum",
    "split": "of a site: each rank attends with all queries to its own keys, and the results are merged over ranks",
    "Ulysses degree": (
        "over how many neighbouring ranks the heads of an attention are divided, each rank with the tokens of all of "
        "them; 1 is a ring over all ranks"
    ),
    "machine": (
        "what computing, memory, kernel calls and transfers cost, as data: given, measured beforehand, or a preset"
    ),
    "way": "how an attention runs over the ranks: its Ulysses degree, and by ring or all-gather",
    "ring": "the process group over which a sequence is sharded",
    "problem": "what a schedule is made for: a mask expression, numbers of queries and keys, their layouts",
    "step": "one exchange and the tiles that use the keys it brings; step 0 uses local keys",
    "transfer": "the tokens that one rank sends to another in a step",
    "program": "the steps of one rank",
    "merge": "combine two partial results of the same rows by their log-sum-exp",
}
"""Term -> meaning, word for word as in the glossary."""
