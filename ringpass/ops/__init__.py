"""The operators of partitioned graphs: between replicated and sharded values, ring attention, counter-based dropout.

The invariant of a partitioned graph: *a replicated value has the full, equal cotangent on every rank; a sharded value
has the cotangent of its local tokens.*  Each operator's autograd formula keeps it:

    operator         forward                                           backward
    shard            takes the local tokens                            all-gather
    gather           all-gather, in original order                     takes the local tokens
    redistribute     local tokens in one layout to those in another    the inverse
    all_to_all       local tokens of all heads to all tokens of some    the inverse
    pool_tokens      local tokens of all heads to those of neighbours,  return_tokens
                     of a share of the heads
    return_tokens    the inverse                                       pool_tokens
    merge_ranks      the results of all ranks for the same queries,    none: inside ring_attention
                     by log-sum-exp
    permute          all tokens, in the order of a curve               the inverse
    reduce_scatter   the local tokens of the sum over ranks            (in backward graphs only)
    halo             ranges of local tokens with their neighbours      sums on the rank that holds the token
    interior_rows    the row of each local token in `halo`'s output    none
    reduce           all-reduce (sum)                                  identity
    extremum         amax or amin over the tokens of all ranks         to equals, evenly over all ranks
    first_extremum   max or min along the sequence, and where it is    to the first of equals
    replicate        identity                                          all-reduce (sum), in float32; rank 0's value of
                                                                       the last `equal`
    ring_attention   local rows of attention over all keys             ring_attention_backward
    host_copy        data that prune schedules, read by the host       none
    block_means      means over blocks of all tokens                   none: the choice has no gradient
    choose_blocks    the pairs of blocks that attend                   none
    locate           the local row of each position, -1 if remote      none
    begin_states     a token for the transfers of one recurrence        end_states: zeros for what enters
    send_states      a state of a recurrence, to the rank of a later    receive_states
                     chunk; gives a token (`ops.states`)
    receive_states   the token and the state, from another rank         send_states
    end_states       what leaves, once all transfers are made           identity, and begin_states
    keep             the keep mask of local elements                   none
    dropout          the kept elements, scaled                         the same with the same keep mask

`replicate` follows each replicated value that needs a gradient and has sharded consumers; it takes a list, so that the
gradients of many parameters are summed in one message.  It also follows parameters that replicated nodes read: their
cotangents, which each rank computes by itself, may differ in the last bits, so all ranks take rank 0's.  They are the
last of the list, `equal` of them.  `ring_attention` returns [out, lse], its backward [dq, dk, dv,
*gradients of the learned leaves].  None of the operators aliases its inputs.

`shard` and `gather` ignore the curve of a layout: `permute` comes before `shard`, and its inverse after `gather`.
Dropout, block means and `locate` use the original order of tokens, so that results do not depend on the layout.
"""

from __future__ import annotations

from ringpass.ops.attention import (
    host_copy,
    ring_attention,
    ring_attention_backward,
    ring_attention_backward_body,
    ring_attention_body,
    site_of,
)
from ringpass.ops.boundary import (
    all_to_all,
    gather,
    permute,
    redistribute,
    reduce,
    reduce_list,
    reduce_scatter,
    replicate,
    shard,
    silent,
)
from ringpass.ops.extremes import extremum, first_extremum
from ringpass.ops.halos import halo, halo_backward, interior_rows
from ringpass.ops.merge_ranks import merge_ranks
from ringpass.ops.pooling import pool_tokens, return_tokens
from ringpass.ops.random import dropout, keep
from ringpass.ops.selection import block_means, choose_blocks, locate
from ringpass.ops.states import begin_states, end_states, receive_states, send_states

__all__ = [
    "COMMUNICATING", "all_to_all", "begin_states", "block_means", "choose_blocks", "dropout", "end_states",
    "extremum", "first_extremum", "gather", "halo", "halo_backward", "host_copy", "interior_rows", "keep", "locate",
    "merge_ranks", "permute", "pool_tokens", "receive_states", "redistribute", "reduce", "reduce_list",
    "reduce_scatter", "replicate", "return_tokens", "ring_attention", "ring_attention_backward",
    "ring_attention_backward_body", "ring_attention_body", "send_states", "shard", "silent", "site_of",
]  # fmt: skip
COMMUNICATING = (
    shard, gather, redistribute, all_to_all, halo, halo_backward, reduce, reduce_list, reduce_scatter, replicate,
    block_means, extremum, first_extremum, ring_attention, ring_attention_backward, send_states, receive_states,
    pool_tokens, return_tokens, merge_ranks,
)  # fmt: skip
"""Saved for the backward, never recomputed.  Those that talk to other ranks in their forward (all but `shard` and
`replicate`) are kept in graph order by code generation."""
