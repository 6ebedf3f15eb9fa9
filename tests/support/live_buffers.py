"""Reading the code that Inductor generates, for CPU and CUDA alike: which call follows which, and what is alive.

    steps = read(code, {"attention_tile": (torch.bfloat16, torch.float32)})
    check_exchanges(steps)                                  # starts in order, no buffer freed before its wait
    most_alive(steps, UNFINISHED) / block                   # in blocks

A buffer is counted from the call that makes it to the `del` of its last name, or to its reuse as another buffer.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

MESSAGE, RECEIVED, RESULT, OTHER = "packed message", "received message", "tile result", "other"
IN_FLIGHT = "message in flight"
UNFINISHED = frozenset({IN_FLIGHT, RESULT})
"""Messages started and not yet waited for, and tile results not yet merged."""
MESSAGES = frozenset({IN_FLIGHT, MESSAGE, RECEIVED})
"""All message buffers: packed, in flight, in use."""


@dataclass
class Buffer:
    """`size`: bytes; what it holds: one of the kinds above."""

    size: int
    kind: str = OTHER


@dataclass(frozen=True)
class CodeStep:
    """One call: `op` is an operator of ringpass or the name of a function, `alive` the bytes after it, by kind.

    For an exchange and a wait, `key` is the place of the exchange in the global order of starts (`schedule.order`);
    `reads`: the buffers that the call reads, its `after` left out, `makes`: those that it makes; `freed`: those freed
    before the next call.
    """

    op: str
    key: int | None
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    alive: Mapping[str, int]
    freed: list[int] = field(default_factory=list)


def read(code: str, results: Mapping[str, Sequence[torch.dtype]]) -> list[CodeStep]:
    """The calls of a generated module, in order.

    results: the dtypes of what each tile operator returns, which the code does not say; those of others count 0 bytes.
    """
    calls = [x for x in ast.walk(ast.parse(code)) if isinstance(x, ast.FunctionDef) and x.name == "call"]
    assert len(calls) == 1, f"expected one function `call`, found {len(calls)}"
    reader = _Reader(results)
    for statement in _statements(calls[0].body):
        reader.run(statement)
    return reader.steps


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _statements(statement.body)
        else:
            yield statement


class _Reader:
    """Runs the statements of `call` on the names of buffers."""

    def __init__(self, results: Mapping[str, Sequence[torch.dtype]]) -> None:
        self.results, self.steps = results, list[CodeStep]()
        self.names: dict[str, list[int]] = {}  # the buffers that a name stands for: several for a list of results
        self.buffers: dict[int, Buffer] = {}
        self.keys: dict[int, int] = {}  # of exchanges in flight, by the buffer that they receive
        self.assigned = (0, "")  # line and source of the last renaming

    def run(self, statement: ast.stmt) -> None:
        """One statement."""
        if isinstance(statement, ast.Delete):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    self._delete(target.id, statement.lineno)
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            self._assign(statement.targets[0].id, statement.value, statement.lineno)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            self._expression(statement.value)

    def _assign(self, name: str, value: ast.expr, line: int) -> None:
        if isinstance(value, ast.Name):
            self.names[name] = list(self.names.get(value.id, []))
            self.assigned = line, value.id
        elif isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant):
            held, at = self.names.get(ast.unparse(value.value), []), ast.literal_eval(value.slice)
            self.names[name] = held[at : at + 1]
        elif isinstance(value, ast.Call) and ast.unparse(value.func).startswith("empty_strided"):
            shape, strides, dtype = (ast.unparse(x) for x in value.args[:3])
            size = _extent(ast.literal_eval(shape), ast.literal_eval(strides)) * _dtype(dtype).itemsize
            self.names[name] = [self._new(size, OTHER)]
        elif isinstance(value, ast.Call):
            self.names[name] = self._call(value)

    def _expression(self, call: ast.Call) -> None:
        if ast.unparse(call.func) == "assert_size_stride":
            self._measure(*call.args[:3])
        elif not ast.unparse(call.func).startswith(("assert_", "args.")):
            self._call(call)

    def _call(self, call: ast.Call) -> list[int]:
        op = ast.unparse(call.func).removeprefix("torch.ops.ringpass.").removesuffix(".default")
        args = call.args[:-1] if op.startswith("attention_tile") else call.args[:1] if op == "exchange" else call.args
        reads = tuple(self._buffers_in(args))
        made: list[int] = []
        key = None
        if op == "exchange":
            size = ast.literal_eval(call.args[1]) * _dtype(ast.unparse(call.args[2])).itemsize
            tag = ast.literal_eval(call.args[5])
            key = tag + 2 if tag % 2 else tag
            made = [self._new(size, IN_FLIGHT)]
            self.keys[made[0]] = key
            for number in reads:
                self.buffers[number].kind = MESSAGE
        elif op == "wait" and reads:
            self.buffers[reads[0]].kind, key = RECEIVED, self.keys.pop(reads[0])
        elif op in self.results:
            made = [self._new(0, RESULT) for _ in self.results[op]]
        elif op.startswith(("torch.ops.", "pack")):
            made = [self._new(0, MESSAGE if op == "pack" else OTHER)]
        self.steps.append(CodeStep(op, key, reads, tuple(made), self._alive()))
        return made

    def _measure(self, of: ast.expr, shape: ast.expr, strides: ast.expr) -> None:
        """A size that is asserted, of what an operator returned."""
        for number in self.names.get(ast.unparse(of), []):
            op, made = next(((s.op, s.makes) for s in self.steps if number in s.makes), ("", ()))
            if op in self.results and not self.buffers[number].size:
                extent = _extent(ast.literal_eval(shape), ast.literal_eval(strides))
                self.buffers[number].size = extent * self.results[op][made.index(number)].itemsize
                self.steps[-1] = replace(self.steps[-1], alive=self._alive())

    def _delete(self, name: str, line: int) -> None:
        numbers = self.names.pop(name, [])
        for number in numbers:
            if self.assigned == (line, name):
                self.buffers[number].kind = OTHER  # reused as another buffer
            elif not any(number in held for held in self.names.values()):
                del self.buffers[number]
            else:
                continue
            if self.steps:
                self.steps[-1].freed.append(number)

    def _buffers_in(self, args: Sequence[ast.expr]) -> list[int]:
        used = [x.id for arg in args for x in ast.walk(arg) if isinstance(x, ast.Name)]
        return [number for name in used for number in self.names.get(name, [])]

    def _new(self, size: int, kind: str) -> int:
        self.made = getattr(self, "made", 0) + 1
        self.buffers[self.made] = Buffer(size, kind)
        return self.made

    def _alive(self) -> dict[str, int]:
        kinds = {buffer.kind for buffer in self.buffers.values()}
        return {kind: sum(x.size for x in self.buffers.values() if x.kind == kind) for kind in kinds}


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The elements from the first to the last of a strided tensor."""
    if not math.prod(shape):
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."))
    assert isinstance(found, torch.dtype), text
    return found


# --- what is checked --------------------------------------------------------------------------------------------------


def most_alive(steps: Sequence[CodeStep], kinds: frozenset[str]) -> int:
    """The most bytes of these kinds that are alive after any call."""
    return max((sum(size for kind, size in step.alive.items() if kind in kinds) for step in steps), default=0)


def counts(steps: Sequence[CodeStep]) -> dict[str, int]:
    """How often each operator or kernel is called."""
    return {op: sum(step.op == op for step in steps) for op in dict.fromkeys(step.op for step in steps)}


def check_exchanges(steps: Sequence[CodeStep], most: int = 2) -> None:
    """Raises AssertionError unless the exchanges of one attention are right.

    They start in the one global order; each of keys starts before a tile that hides it; at most `most` are in flight;
    neither what is sent nor what is received is freed or reused before the wait.
    """
    started: dict[int, tuple[int, ...]] = {}  # by key: the buffers of exchanges in flight
    keys = [step.key for step in steps if step.op == "exchange"]
    assert keys == sorted(keys, key=lambda key: key or 0), f"exchanges start in the order {keys}"
    hidden: set[int] = set()
    for step in steps:
        if step.op == "exchange" and step.key is not None:
            started[step.key] = (*step.reads, *step.makes)
            assert len(started) <= most, f"{len(started)} exchanges are in flight, of keys {sorted(started)}"
        elif step.op in ("attention_tile", "attention_tile_backward"):
            hidden |= set(started)
        elif step.op == "wait" and step.key is not None:
            del started[step.key]
            assert step.key % 2 or step.key in hidden, f"no tile hides the exchange with key {step.key}"
        held = {number for numbers in started.values() for number in numbers}
        assert not held & set(step.freed), f"buffers {held & set(step.freed)} are freed before their wait"
    assert not started, f"exchanges with keys {sorted(started)} are never waited for"
