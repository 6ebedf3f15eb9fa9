"""Handing a partitioned graph to a compiler: Inductor, or AOTAutograd alone.

The uses of private torch names in this file are the hook after AOTAutograd, and the lowering of communicating ops as
Inductor collectives, which its scheduler keeps in graph order.  Order matters: ranks differ in sizes, and a
scheduler that sorts by size would let two ranks enter two different collectives.  A test compiles and fails when torch
changes it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import register_lowering
from torch.fx import Graph, GraphModule

import ringpass
from ringpass import ops
from ringpass.config import RingConfig
from ringpass.ops import gradient_sums, pooling, primitives
from ringpass.passes.lower.lower import inline_arithmetic, lower, lower_module
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.partition.partitioned import Partitioned

Show = Callable[[str, GraphModule], None]
"""Is given the stage, "forward" or "backward", and its lowered graph."""
ShowCode = Callable[[str, str], None]
"""Is given the stage and the code that Inductor generated for it."""
Compiled = Callable[..., Any]
"""What a backend returns to Dynamo: the graph's inputs -> its outputs."""


def compile_unpartitioned(gm: GraphModule, inputs: Sequence[Any], inductor: dict[str, Any], compiler: str) -> Compiled:
    """Compiles `gm` as torch would without ringpass; `inductor`: patches of Inductor's configuration."""
    if compiler == "aot_eager":
        return aot_eager(gm, inputs, 0, sys.maxsize, _unseen)
    return _inductor(gm, inputs, inductor or None)


def compile_partitioned(
    program: Partitioned,
    config: RingConfig,
    inductor: dict[str, Any],
    rank: Rank,
    left: int,
    show: Show,
    shown: bool,
    show_code: ShowCode | None = None,
) -> Compiled:
    """Compiles one rank's program.  `show` sees the lowered forward and backward, `show_code` Inductor's code of them.

    `left`: how many attentions stay as the model wrote them.  `shown`: someone looks at the stages, so the caches,
    which would skip them, are left out.
    """
    gm, inputs = program.gm, list(program.inputs)
    if config.compiler == "aot_eager":
        return aot_eager(gm, inputs, config.unroll_limit, left, show)
    _register_collectives()
    key = rank.rank, rank.world, rank.group, config.unroll_limit, left
    patches = {**inductor, "post_grad_custom_pre_pass": _Lower(key, show)}
    if not shown:
        return _inductor(gm, inputs, patches)
    patches |= {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return _inductor(gm, inputs, patches, show_code)


def show_lowered(
    gm: GraphModule,
    inputs: Sequence[Any],
    config: RingConfig,
    inductor: dict[str, Any],
    left: int,
    show: Show,
) -> None:
    """Shows the lowered forward and backward of a program, made as for a run, without generating code or running it.

    `left`: how many attentions stay as the model wrote them.  The partitioner of the compiler decides what is saved.
    """
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        if config.compiler == "aot_eager":
            aot_eager(gm, inputs, config.unroll_limit, left, show)
            return

        def inner(graph: GraphModule, _: Any, **about: Any) -> Compiled:
            lower_module(graph, config.unroll_limit, left)
            show("backward" if about.get("is_backward") else "forward", graph)
            unused: Compiled = make_boxed_func(graph.forward)
            return unused

        from torch._inductor.compile_fx import compile_fx

        compile_fx(gm, list(inputs), inner_compile=inner, config_patches=inductor or None)  # type: ignore[arg-type]


def _inductor(
    gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any] | None, show_code: ShowCode | None = None
) -> Compiled:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(*args: Any, **kwargs: Any) -> Any:
        made = compile_fx_inner(*args, **kwargs)
        if show_code and (code := getattr(made, "source_code", "")):
            show_code("backward" if kwargs.get("is_backward") else "forward", code)
        return made

    chosen = inner if show_code else compile_fx_inner
    return compile_fx(gm, list(inputs), inner_compile=chosen, config_patches=patches)  # type: ignore[return-value]


def _unseen(stage: str, graph: GraphModule) -> None:
    """A `Show` that looks at nothing."""


def aot_eager(gm: GraphModule, inputs: Sequence[Any], unroll_limit: int, left: int, show: Show) -> Compiled:
    """Runs the lowered forward and backward graphs as they are, without code generation.

    `unroll_limit`: as in RingConfig; `left`: how many attentions stay as the model wrote them.
    """

    def compiler(stage: str) -> Callable[[GraphModule, Any], Compiled]:
        def compile_graph(graph: GraphModule, _: Any) -> Compiled:
            show(stage, lower_module(graph, unroll_limit, left))
            _reshape_views(graph)
            boxed: Compiled = make_boxed_func(graph.forward)
            return boxed

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    return backend(gm, list(inputs))


def _reshape_views(gm: GraphModule) -> None:
    """Views as reshapes: some backward ops of torch give other strides than their fakes (`softplus_backward`)."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.recompile()


class _Lower(CustomGraphPass):
    """`lower` as Inductor's hook before its own post-grad passes: runs for forward and backward.

    `key` is what a lowered graph depends on beside the graph before it; its last two entries are `lower`'s.
    """

    def __init__(self, key: tuple[Any, ...], show: Show) -> None:
        self.key, self.show, self.seen = key, show, 0

    def __call__(self, graph: Graph) -> None:
        lower(graph, *self.key[-2:])
        module = graph.owning_module
        if isinstance(module, GraphModule):
            self.show("forward" if self.seen == 0 else "backward", module)
        inline_arithmetic(graph)
        self.seen += 1

    def uuid(self) -> Any:
        return (_sources(), *self.key)

    def __getstate__(self) -> Any:
        return self.key

    def __setstate__(self, key: Any) -> None:
        self.key, self.show, self.seen = key, _unseen, 0


def source_files() -> list[Path]:
    """Every source file of the package, sorted: what a compiled graph may depend on.

    `ringpass/passes` is a symlink in a checkout and a folder in a wheel; `rglob` does not follow symlinks, so both
    folders are walked by name.
    """
    package = Path(ringpass.__file__).resolve().parent
    return sorted({*package.rglob("*.py"), *(package / "passes").resolve().rglob("*.py")})


@cache
def _sources() -> str:
    """Digest of all sources, which enters the key of Inductor's cache."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in source_files())).hexdigest()


COMPLETE = tuple(op for op in ops.COMMUNICATING if op not in (ops.shard, ops.replicate))
"""Ops that talk to other ranks and are complete when they return."""


@cache
def _register_collectives() -> None:
    """Lowers each op that talks to other ranks as an Inductor collective.

    `exchange`, `start_gather`, `start_all_to_all` and `start_sum` are still under way when they return.  Inductor keeps
    the buffers that the first three read alive, and unwritten, until the `wait` on what they return, output i standing
    for input i.  What `start_sum` reads may go at once, as it sums a buffer of its own; `wait_sum` counts as writing
    this buffer.
    """
    for op in (*COMPLETE, *pooling.BUFFERED, gradient_sums.start_sum):

        def lowering(first: Any, *args: Any, op: Any = op) -> Any:
            if isinstance(first, list):
                first = [ir.ExternKernel.require_contiguous(x) for x in first]
            out = ir._CollectiveKernel.create_out_of_place(op, first, *args)
            return torch.utils._pytree.tree_map(ir.TensorBox.create, out)

        register_lowering(op, type_promotion_kind=None)(lowering)

    def wait(received: Any) -> Any:
        ir._WaitKernel.create_wait(primitives.wait, received)
        return received

    register_lowering(primitives.wait, type_promotion_kind=None)(wait)

    def wait_sum(flat: Any, group: str) -> Any:
        ir._CollectiveKernel.create_inplace(gradient_sums.wait_sum, flat, group)
        return flat

    register_lowering(gradient_sums.wait_sum, type_promotion_kind=None)(wait_sum)
    for impure in (*pooling.BUFFERED, gradient_sums.start_sum, primitives.wait, gradient_sums.wait_sum):
        torch.fx.node.has_side_effect(impure)
