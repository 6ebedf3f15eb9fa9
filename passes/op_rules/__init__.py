"""What propagate, place and partition know of each op: one record per op (`spec.OpRule`), one file per family.

An op without a record still compiles: its operands are gathered, and the gather is reported by the op's name.  An op
that torch tags as pointwise has its record already.  To add another one, say in the file of its family how the dims of
its result come from those of its operands, and put it into that file's `RULES`, by the op's name without `aten.`:

    def _cross(sweep: Sweep, node: Node, note: Note) -> Dims:
        dims = sweep.broadcast([sweep.dims(n) for n in operands_of(node)], note)    # dims of x and y are the same index
        note.need_replication += dims[bound_of(node).get("dim", -1)]                # all of this one is read at once
        return dims

    RULES = {.., "linalg_cross.default": OpRule(_cross)}

That is all for an op that is right on local tokens as it stands.  Dims that an op sums over go to `note.reduction`, and
its `reduce` writes the local sum and adds it over ranks.  A call that must be changed for local tokens (a shape, a
halo, a random mask) has a `write` of its own.  A rule that does not understand a call returns None.
`tests/passes/test_op_rules.py` runs each op on shards and compares with the op itself: add a case there.

    pointwise       elementwise ops, casts, dropout, pointwise autograd.Functions
    contractions    linear, matrix products, einsum, embedding
    norms           batch, group and instance norm: statistics over the tokens of all ranks
    along_dims      along dims needed replicated: layer norm, softmax, cumsum, flip
    reductions      sum, max, variance, norm, ..: local results, combined over ranks
    losses          pointwise losses, cross entropy, nll_loss: added over ranks
    views           view, transpose, expand, split, stack, getitem
    creation        tensors made from sizes: zeros, arange, rand
    slicing         slice, cat, pad and convolutions along the sequence
    selecting       select, index, gather, topk: a few tokens of a sharded value
    routing         sort, histc, index_put, grouped_mm: tokens sorted by expert
    attention       attention calls, which the plan partitions

`table` collects them: `rule_for(node)`.
"""
