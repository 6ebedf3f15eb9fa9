"""Every op's record, collected from the families; ops that torch tags as pointwise need none."""

from __future__ import annotations

import torch
from torch.fx import Node

from ringpass.nodes import op_name
from ringpass.passes.op_rules import (
    attention,
    contractions,
    creation,
    normalization,
    pointwise,
    reductions,
    routing,
    selecting,
    slicing,
    views,
)
from ringpass.passes.op_rules.spec import OpRule, not_understood

FAMILIES = (
    attention, contractions, creation, normalization, pointwise, reductions, routing, selecting, slicing, views,
)  # fmt: skip
RULES: dict[str, OpRule] = {name: rule for family in FAMILIES for name, rule in family.RULES.items()}
UNKNOWN = OpRule(not_understood)


def rule_for(node: Node) -> OpRule:
    """The record of a node's op; `UNKNOWN` where nothing is known."""
    rule, target = RULES.get(op_name(node)), node.target
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if rule is None and tagged and not target._schema.is_mutable:  # type: ignore[union-attr]
        return pointwise.POINTWISE
    return rule or UNKNOWN


def has_rule(node: Node) -> bool:
    """Whether the dims of a node's op are understood."""
    return rule_for(node).dims is not not_understood


def draws_counter_based(node: Node) -> bool:
    """Whether `node` draws random numbers by counters, so that they are the same for any number of ranks."""
    return node.op == "call_function" and rule_for(node).draws(node)


def draws_shared(node: Node) -> bool:
    """Whether `node` draws from the default generator, which then starts from the same seed on every rank."""
    tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
    return torch.Tag.nondeterministic_seeded in tags and not rule_for(node).counter_based
