"""The compiler passes.  `ringpass.backend.ring_dilated` runs them in this order, by `pipeline`, as one straight line.

Dynamo's graph
  |  capture      capture/     functional, pre-dispatch ATen
  |  decompose    capture/     fused layers as the ops that the other passes know
  |  detect       detect/      attention sites, each with its mask as a function of (b, h, q, k)
  |  propagate    propagate/   which dims of which tensors are the same index
  |  plan         plan/        a layout per sequence axis, a schedule per site; `prove_all` proves the schedules
  |  place        partition/   for each node: on local tokens of an axis, or replicated
  |  partition    partition/   the program of one rank                            (writes)
  |  AOTAutograd               its forward and backward
  |  lower        lower/       ring attention as sends, tiles and merges          (writes)
  v  Inductor                  code

op_rules/     what propagate, place and partition know of each op: one record per op, a file per family
pipeline      times, checks, dumps and compares the result of each stage
verify        the contract of each result
dump          the texts that people read
"""

if __name__ != "ringpass.passes":
    raise ImportError("the passes are part of the package: import ringpass.passes")
