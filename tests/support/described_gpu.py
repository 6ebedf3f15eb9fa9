"""Code that Inductor writes for a device that is not there: nothing is run.

    with fake_ring(rank=3, world=8), generated_code("cuda") as codes:
        compile_attention("cuda", tokens=8192)
    forward, backward = codes                              # Python text

For "cuda" an H100 is described to torch and Triton, whether there is one or not; torch must be a CUDA build, which
brings Triton (`missing` says why it cannot be).  For "cpu" nothing is described.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._guards import TracingContext, tracing
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode

from ringpass.backend import ring_dilated
from ringpass.kernels import cuda as kernels_cuda

NAME, CAPABILITY = "NVIDIA H100 80GB HBM3", (9, 0)
PROPERTIES = types.SimpleNamespace(
    type="cuda", name=NAME, index=0, multi_processor_count=132, cc=90, major=9, minor=0, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, memory_clock_rate=2619000, memory_bus_width=5120, clock_rate=1980000, gcnArchName="",
    is_integrated=False, is_multi_gpu_board=False,
)  # fmt: skip


def missing() -> str:
    """Why this environment cannot write code for CUDA; empty if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if find_spec("triton") else "there is no triton"


@contextmanager
def generated_code(device: str) -> Iterator[list[str]]:
    """Inductor's code for each graph compiled meanwhile, in the order in which it is generated; none of it is loaded.

    Raises RuntimeError for "cuda" where `missing` gives a reason.
    """
    codes: list[str] = []

    def keep(lowering: GraphLowering) -> Any:
        code: Any = lowering.codegen()[0]
        codes.append(getattr(code, "value", code))
        runner = types.SimpleNamespace(partitions=None, recursively_apply_fns=lambda *args: None)
        return types.SimpleNamespace(call=_refuse, __file__="", cache_key="", runner=runner)

    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(described_h100())
        stack.enter_context(fresh_cache())
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(patch.object(GraphLowering, "compile_to_module", keep))
        yield codes


def code_of(call: Callable[[], Any]) -> list[str]:
    """Inductor's code for what `call` compiles on the CPU, forward and backward; `call` ends where it would run.

    >>> forward, backward = code_of(lambda: run(**batch))
    """
    with generated_code("cpu") as codes, suppress(_ReadOnlyError):
        call()
    return codes


class _ReadOnlyError(Exception):
    """Code was generated to be read."""


def _refuse(args: object) -> object:
    raise _ReadOnlyError


@contextmanager
def described_h100() -> Iterator[None]:
    """Torch and Triton take an H100 for present.  Raises RuntimeError where `missing` gives a reason."""
    if reason := missing():
        raise RuntimeError(f"code for CUDA needs a CUDA build of torch with Triton: {reason}")
    from triton.runtime.driver import driver

    values: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES,
        "get_device_capability": CAPABILITY, "get_device_name": NAME, "_lazy_init": None, "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "initial_seed": 0,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
    }  # fmt: skip
    interface = {
        "is_available": True, "get_compute_capability": 90, "device_count": 1, "current_device": 0,
        "get_device_properties": PROPERTIES, "is_triton_capable": True, "raise_if_triton_unavailable": None,
        "synchronize": None, "is_bf16_supported": True,
    }  # fmt: skip
    worker = {"current_device": 0, "get_device_properties": PROPERTIES}
    former = getattr(driver, "_active", None)  # None: Triton has not looked for a device yet
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch.object(torch.cuda, name, _always(value)))
        for target, names in (
            (device_interface.CudaInterface, interface),
            (device_interface.CudaInterface.Worker, worker),
        ):
            for name, value in names.items():
                stack.enter_context(patch.object(target, name, staticmethod(_always(value))))
        for module in (torch.utils._triton, torch._inductor.utils):
            if hasattr(module, "has_triton"):  # torch 2.14's Inductor asks the first alone
                stack.enter_context(patch.object(module, "has_triton", _always(True)))
        for path in ("joint_graph", "post_grad"):  # they fill tables of patterns by running kernels
            stack.enter_context(patch(f"torch._inductor.fx_passes.{path}.lazy_init", _always(None)))
        stack.enter_context(patch.object(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", _always(False)))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", _always(0), create=True))
        for name in ("_lazy_init", "get_rng_state", "set_rng_state"):
            stack.enter_context(patch.object(torch.cuda.random, name, _always(values[name])))
        stack.enter_context(patch.object(kernels_cuda, "capability", _always(CAPABILITY)))
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver.set_active(former)


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value


class _Driver:
    """What Triton asks its driver while code is generated."""

    def get_current_target(self) -> Any:
        """Compute capability 9.0, warps of 32."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_device_capability(self, *args: Any) -> tuple[int, int]:
        """That of an H100."""
        return CAPABILITY

    def is_active(self) -> bool:
        """Yes."""
        return True


# --- what is compiled -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention alone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D) of q, k and v of that shape."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class LlamaLayer(nn.Module):
    """A layer as Llama's, without rotary positions: RMS norms, grouped heads, a gated MLP."""

    def __init__(self, heads: int, groups: int, width: int) -> None:
        super().__init__()
        self.heads, self.groups, self.width, hidden = heads, groups, width, heads * width
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.q, self.kv = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, 2 * groups * width, bias=False)
        self.out, self.down = nn.Linear(hidden, hidden, bias=False), nn.Linear(3 * hidden, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden) of (B, S, hidden)."""
        y = self.norms[0](x)
        q = self.q(y).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.groups, self.width)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x


class SmallLlama(nn.Module):
    """Token table, layers, head and loss."""

    def __init__(self, layers: int, heads: int = 8, groups: int = 2, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(512, heads * width)
        self.layers = nn.ModuleList(LlamaLayer(heads, groups, width) for _ in range(layers))
        self.head = nn.Linear(heads * width, 512, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over (B, S) labels."""
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())


def compile_attention(device: str, tokens: int, heads: int = 8, width: int = 64, **options: Any) -> None:
    """Compiles causal attention in bfloat16 over `tokens` tokens on the current (fake) rank, forward and backward."""
    inputs = [torch.empty(1, heads, tokens, width, dtype=torch.bfloat16, device="meta", requires_grad=True)] * 3
    _compile(Attention(), [x.detach().clone().requires_grad_() for x in inputs], device, options)


def compile_llama(device: str, tokens: int, layers: int, **options: Any) -> None:
    """Compiles the loss of a `SmallLlama` in bfloat16 over `tokens` tokens, forward and backward."""
    with torch.device("meta"):
        model = SmallLlama(layers).to(torch.bfloat16)
    ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    _compile(model, [ids, ids.clone()], device, options)


def _compile(model: nn.Module, inputs: list[Tensor], device: str, options: dict[str, Any]) -> None:
    """Dynamo reads the model on meta tensors; the backend gets its graph with fake tensors on `device`."""
    given: list[Any] = []

    def keep(gm: Any, example_inputs: Any, **about: Any) -> Any:
        given.extend([gm, example_inputs])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    gm, examples = given
    for node in gm.graph.nodes:
        node.meta.pop("example_value", None)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in examples]
        fakes = [x.requires_grad_(old.requires_grad) for x, old in zip(fakes, examples, strict=True)]
    with tracing(TracingContext(mode)):
        ring_dilated(gm, fakes, options={"layout": "zigzag", "outputs": "local", **options})
