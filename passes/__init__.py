"""The compiler passes, one file per stage; `ringpass.backend` runs them in this order.

capture    Dynamo's graph -> functional pre-dispatch ATen
detect     -> attention sites, each with its mask as a function of (b, h, q, k)
factors, rules   which dims of which tensors are the same index; what each op does to them
plan       -> a layout per sequence axis, a schedule problem per site
placement  -> for each node: on an axis, or whole
partition  -> the program of one rank            (writes)
lower      after AOTAutograd -> Inductor's input (writes)
verify     proves the schedules of all ranks together
dump       readable text of every stage
"""

if __name__ != "ringpass.passes":
    raise ImportError("the passes are part of the package: import ringpass.passes")
