"""Capture keeps what a model computes, forward and backward, and leaves one functional ATen node per operation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._ops import HigherOrderOperator
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ringpass.passes.capture.capture import CaptureError, SelectiveCheckpointError
from ringpass.passes.capture.functionalize import MutationError, functional_twin
from tests.support.captured import Backend, check, grads
from tests.support.pipeline_stages import captured_graph

aten = torch.ops.aten


@pytest.fixture
def backend() -> Backend:
    torch._dynamo.reset()
    return Backend()


class Triple(torch.autograd.Function):
    """Its gradient is not that of its forward: only an op that is not decomposed gives it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = grad * 3 * x
        return result


def test_autograd_function_keeps_its_gradient(backend: Backend) -> None:
    check(backend, lambda x: Triple.apply(x * 2) + 1, grads(3, 4))  # type: ignore[no-untyped-call]
    assert backend.count(torch.ops.higher_order.autograd_function_apply) == 1


def test_autocast_regions_keep_their_dtypes(backend: Backend) -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, w)
            with torch.autocast("cpu", enabled=False):
                z = F.linear(x, w)
        return y, z + F.linear(x, w)

    y, z = check(backend, f, grads(3, 4), grads(5, 4))
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    dtypes = [n.meta["val"].dtype for n in backend.graph.nodes if n.target is aten.linear.default]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


def test_in_place_ops_keep_their_dtype_under_autocast(backend: Backend) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        with torch.autocast("cpu", torch.bfloat16):
            y.addmm_(x, x)  # in place: no cast; its twin is on autocast's list
        return y

    x = torch.randn(4, 4)
    got = torch.compile(f, backend=backend, fullgraph=True)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, f(x), rtol=2e-2, atol=5e-2)


def test_vmapped_mask(backend: Backend) -> None:
    def f(q: Tensor, padding: Tensor) -> Tensor:
        def allowed(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & padding[b, j]

        rows, columns = torch.arange(q.shape[-2]), torch.arange(q.shape[-2])
        over_columns = torch.vmap(allowed, in_dims=(None, None, 0))
        mask = torch.vmap(torch.vmap(over_columns, in_dims=(None, 0, None)), in_dims=(0, None, None))
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask(torch.arange(q.shape[0]), rows, columns)[:, None])

    padding = torch.arange(6)[None] < torch.tensor([[6], [4]])
    check(backend, f, grads(2, 2, 6, 4), padding)
    assert backend.count(aten.scaled_dot_product_attention.default) == 1
    mask = next(n for n in backend.graph.nodes if n.target is aten.scaled_dot_product_attention.default).args[3]
    assert isinstance(mask, fx.Node) and tuple(mask.meta["val"].shape) == (2, 1, 6, 6)
    assert not any("nesting" in str(n.target) or "batch_dim" in str(n.target) for n in backend.graph.nodes)


def test_vmap_carries_gradients(backend: Backend) -> None:
    check(backend, lambda x, y: torch.vmap(lambda a, b: a * b.sum() + y.mean())(x, y), grads(3, 4), grads(3, 4))


def test_no_grad_inside_vmap_is_refused(backend: Backend) -> None:
    def row(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.exp()
        return x * y

    with pytest.raises(BackendCompilerFailed) as error:
        check(backend, torch.vmap(row), grads(3, 4))
    assert isinstance(error.value.inner_exception, CaptureError)


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_no_gradient_passes_a_no_grad_region(backend: Backend, region: Callable[[], Any]) -> None:
    def f(x: Tensor) -> Tensor:
        with region():
            scale = x.exp().sum()
        return x * scale

    if region is torch.inference_mode:  # eager autograd refuses its tensors: compare with the gradient meant
        x = grads(3)
        torch.compile(f, backend=backend, fullgraph=True)(x).sum().backward()
        torch.testing.assert_close(x.grad, x.detach().exp().sum().expand(3))
    else:
        check(backend, f, grads(3))
    switches = [n.args[0] for n in backend.graph.nodes if n.target is torch._C._set_grad_enabled]
    assert switches == [False, True]
    assert torch.is_grad_enabled()


def test_flex_attention_and_invoke_subgraph_stay_whole(backend: Backend) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compiler.nested_compile_region
    def block(x: Tensor) -> Tensor:
        return F.gelu(x) * 2

    def f(q: Tensor) -> Tensor:
        return flex_attention(block(block(q)), q, q, score_mod=lambda s, b, h, i, j: s + i - j)

    check(backend, f, torch.randn(1, 2, 8, 16))
    assert backend.count(torch.ops.higher_order.flex_attention) == 1
    calls = [n for n in backend.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]
    assert len(calls) == 2 and len({n.args[0] for n in calls}) == 1


# -- activation checkpointing


def mlp(x: Tensor, w: Tensor, wrap: bool) -> Tensor:
    def block(y: Tensor) -> Tensor:
        return torch.sin(torch.sin(F.dropout(y, 0.0) @ w).relu_() @ w)

    for _ in range(3):
        x = checkpoint(block, x, use_reentrant=False) if wrap else block(x)
    return x


def saved(backend: Backend) -> int:
    """Elements that the forward graph keeps for the backward graph, its own inputs left out."""
    (outputs,) = backend.forwards[-1].graph.find_nodes(op="output")
    kept = {n for n in outputs.all_input_nodes if n.op != "placeholder"}
    return sum(n.meta["val"].numel() for n in kept)


def test_checkpoint_bodies_are_flattened_and_recomputed(backend: Backend) -> None:
    x, w = grads(8, 8), grads(8, 8)
    check(backend, lambda x, w: mlp(x, w, True), x, w)
    assert not any(isinstance(n.target, HigherOrderOperator) for n in backend.graph.nodes)
    ids = [n.meta["ac_graph_id"] for n in backend.graph.nodes if n.target is aten.matmul.default]
    assert ids == [1, 1, 2, 2, 3, 3]
    assert all("recompute" in n.meta for n in backend.graph.nodes if n.op == "call_function")

    plain = Backend()
    torch._dynamo.reset()
    check(plain, lambda x, w: mlp(x, w, False), x, w)
    assert not any("recompute" in n.meta for n in plain.graph.nodes)
    assert saved(backend) <= 3 * 64 < saved(plain)


def test_nested_checkpoints_carry_the_inner_tag(backend: Backend) -> None:
    def inner(x: Tensor) -> Tensor:
        return x.sin().cos()

    def outer(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(inner, x.exp(), use_reentrant=False)
        return out.tanh()

    check(backend, lambda x: checkpoint(outer, x, use_reentrant=False), grads(3))
    ids = [n.meta["ac_graph_id"] for n in backend.graph.nodes if n.op == "call_function"]
    assert ids == [1, 2, 2, 1]


def test_selective_checkpoint_is_refused(backend: Backend) -> None:
    def contexts() -> Any:
        return create_selective_checkpoint_contexts([aten.mm.default])

    def f(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda a: (a @ a).sin(), x, use_reentrant=False, context_fn=contexts)
        return out

    with pytest.raises(BackendCompilerFailed) as error:
        torch.compile(f, backend=backend)(grads(4, 4))
    assert isinstance(error.value.inner_exception, SelectiveCheckpointError)


# -- in-place operations


def test_changed_inputs_are_copied_back(backend: Backend) -> None:
    def f(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        cache.index_copy_(1, at, new)
        row = cache[0]
        cache.add_(1)
        cache[1:].mul_(2)
        return row * 2 + cache.sum()

    check(backend, f, torch.randn(2, 6, 3), torch.tensor([4, 1]), torch.randn(2, 2, 3))
    assert backend.count(aten.copy_.default) == 3
    assert backend.count(aten.index_copy.default) == 1


def test_an_input_returned_after_a_change_is_the_input(backend: Backend) -> None:
    x = torch.zeros(3)
    assert torch.compile(lambda x: x.add_(1), backend=backend)(x).data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, torch.ones(3))


def test_a_parameter_changed_under_no_grad_keeps_its_gradient(backend: Backend) -> None:
    def f(w: Tensor) -> Tensor:
        with torch.no_grad():
            w.mul_(0.5)
            w[0].fill_(2)
        return w.square().sum()

    check(backend, f, grads(3, 2))


@pytest.mark.parametrize("hide", (Tensor.detach, lambda w: w.data))
def test_a_parameter_changed_behind_autograd_keeps_its_gradient(
    backend: Backend, hide: Callable[[Tensor], Tensor]
) -> None:
    def f(w: Tensor) -> Tensor:
        hide(w).clamp_(-0.1, 0.1)
        hide(w)[0].mul_(2)
        return w.square().sum() + hide(w).sum()

    check(backend, f, grads(3, 2))


def test_changes_through_views_reach_all_views(backend: Backend) -> None:
    def f(x: Tensor, other: Tensor) -> Tensor:
        y = x * 2
        rows, flat, turned = y[1:], y.view(-1), y.transpose(0, 1)
        rows[0] = other[0]
        rows.add_(1)
        flat[3:6].mul_(x[0, :3])
        turned[2].zero_()
        y.unsqueeze(0).permute(2, 0, 1).masked_fill_(other.t()[:, None] > 0, 0.25)
        left, right = y.split(2, dim=1)
        return y.sum() * flat + turned.sum() + rows.sum() + torch.sum(left * right)

    check(backend, f, grads(3, 4), torch.randn(3, 4))


def test_in_place_casts_back_and_broadcasts(backend: Backend) -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        half, filled, flag = x.to(torch.bfloat16), torch.zeros(3, 4), x > 0
        half += y
        filled.copy_(y[0].double())
        flag &= y > 0
        constant = torch.tensor([1.0, 2.0])
        constant.add_(1)
        number = x * 2
        number[:, 1] = 3.0
        y[0] = 1.0
        return half, filled, flag, constant, number, y

    check(backend, f, torch.randn(3, 4), torch.randn(3, 4))


def test_shift_of_labels(backend: Backend) -> None:
    def shift(ids: Tensor) -> Tensor:
        out = ids.new_zeros(ids.shape)
        out[:, 1:] = ids[:, :-1].clone()
        out[:, 0] = 7
        return out.masked_fill_(out == 3, 9)

    check(backend, shift, torch.arange(10).view(2, 5))
    assert backend.count(aten.slice_scatter.default, aten.select_scatter.default) == 2


def test_random_in_place_ops_draw_alike(backend: Backend) -> None:
    def f(x: Tensor) -> Tensor:
        keep = x.new_empty((x.shape[0], 1)).bernoulli_(0.5).div_(0.5)
        return x * keep

    torch.manual_seed(0)
    want = f(torch.ones(32, 2))
    torch.manual_seed(0)
    got = torch.compile(f, backend=backend)(torch.ones(32, 2))
    torch.testing.assert_close(got, want)


def through_strides(x: Tensor) -> Tensor:
    y = x * 2
    y.as_strided((2,), (2,)).add_(1)
    return y


def under_no_grad(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():
        y.add_(1)
    return y


def behind_detach(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().mul_(2)
    return y


def behind_data(x: Tensor) -> Tensor:
    y = x.square()
    x.data.mul_(2)
    return y


@pytest.mark.parametrize("f", [through_strides, under_no_grad, behind_detach, behind_data])
def test_changes_without_a_functional_form_are_refused(backend: Backend, f: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BackendCompilerFailed) as error:
        torch.compile(f, backend=backend)(grads(4))
    assert isinstance(error.value.inner_exception, MutationError)


def test_twins() -> None:
    assert functional_twin(aten.add_.Tensor) is aten.add.Tensor
    assert functional_twin(aten.bernoulli_.float) is aten.bernoulli.p
    assert functional_twin(aten.__ior__.Tensor) is aten.bitwise_or.Tensor
    for op in (aten.add.out, aten.unsqueeze_.default, aten.set_.source_Tensor):
        with pytest.raises(MutationError):
            functional_twin(op)


# -- symbolic sizes


def scaled(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w).view(x.shape[0] * x.shape[1], -1)
    y = y + torch.arange(x.shape[1], dtype=x.dtype).repeat(x.shape[0])[:, None]
    y.view(-1)[1:].mul_(2)
    return F.scaled_dot_product_attention(x, x, x, is_causal=True) + y.sum()


@pytest.mark.parametrize("dynamic", [True, None])
def test_symbolic_sizes_stay_symbolic(backend: Backend, dynamic: bool | None) -> None:
    compiled = torch.compile(scaled, backend=backend, fullgraph=True, dynamic=dynamic)
    w = torch.randn(4, 4)
    for length in (8, 12, 30):
        x = torch.randn(2, length, 4)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x, w), scaled(x, w))
    assert len(backend.captured) == 1
    attention = next(n for n in backend.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert isinstance(attention.meta["val"].shape[1], torch.SymInt)


def test_dynamic_module_floats(backend: Backend) -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.37

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, scale=self.scale) * self.scale

    model, x = Scale(), torch.randn(2, 5, 4)
    torch.testing.assert_close(torch.compile(model, backend=backend, dynamic=True)(x), model(x))


def test_a_restart_of_dynamo_is_not_swallowed() -> None:
    def restart(x: Tensor) -> Tensor:
        raise TensorifyScalarRestartAnalysis

    graph = fx.Graph()
    graph.output(graph.call_function(restart, (graph.placeholder("x"),)))
    with pytest.raises(TensorifyScalarRestartAnalysis):
        captured_graph(fx.GraphModule({}, graph), [torch.ones(2)])


# -- models


def tiny_gpt2() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, use_cache=False)
    ids = torch.randint(50, (2, 12))
    padding = (torch.arange(12)[None] < torch.tensor([[12], [9]])).long()
    return GPT2LMHeadModel(config), {"input_ids": ids, "attention_mask": padding, "labels": ids}


def tiny_llama() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=50,
        use_cache=False,
    )
    ids = torch.randint(50, (2, 12))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12)[None]}


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("recompute", [False, True])
def test_models(build: Callable[[], Any], recompute: bool, backend: Backend) -> None:
    torch.manual_seed(0)
    model, batch = build()
    model = model.double().eval()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    reference = copy.deepcopy(model)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    want = reference(**batch)
    compiled: Any = torch.compile(model, backend=backend)
    got = compiled(**batch)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    nodes = [n for captured in backend.captured for n in captured.gm.graph.nodes]
    targets = [n.target for n in nodes]
    assert targets.count(aten.scaled_dot_product_attention.default) == 2
    assert targets.count(aten.cross_entropy_loss.default) == 1
    assert targets.count(aten.embedding.default) == (2 if build is tiny_gpt2 else 1)
    assert targets.count(aten.layer_norm.default) == (5 if build is tiny_gpt2 else 0)
    assert targets.count(aten.linear.default) == (1 if build is tiny_gpt2 else 15)
    assert any("nn_module_stack" in n.meta for n in nodes)
    assert any("recompute" in n.meta for n in nodes) == recompute


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(backend: Backend, need_weights: bool) -> None:
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def f(x: Tensor) -> Tensor:
        out: Tensor = attention(x, x, x, need_weights=need_weights)[0]
        return out

    check(backend, f, grads(2, 5, 16))
    assert backend.count(aten.scaled_dot_product_attention.default) == (not need_weights)
    assert backend.count(aten.softmax.int) == need_weights


def test_constants_and_capture_without_dynamo() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x * self.table, (4,))

    model, x = Table(), torch.randn(3, 4)
    captured = captured_graph(fx.symbolic_trace(model), [x])
    assert len(captured.gm.graph.find_nodes(op="get_attr")) == 1
    torch.testing.assert_close(captured.gm(x), model(x))
    captured.gm(x).square().sum().backward()
    assert model.table.grad is not None
