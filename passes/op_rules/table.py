"""Every op's record, collected from the families; ops that torch tags as pointwise need none."""

from __future__ import annotations

import torch
from torch.fx import Node

from ringpass.nodes import mutates, op_name, operands_of, tags_of
from ringpass.passes.op_rules import (
    along_dims,
    attention,
    batched,
    contractions,
    creation,
    losses,
    merging,
    norms,
    pointwise,
    reductions,
    routing,
    scattering,
    selecting,
    slicing,
    views,
)
from ringpass.passes.op_rules.spec import OpRule, Reads, not_understood

FAMILIES = (
    along_dims, attention, batched, contractions, creation, losses, merging, norms, pointwise, reductions, routing,
    scattering,
    selecting, slicing, views,
)  # fmt: skip
RULES: dict[str, OpRule] = {name: rule for family in FAMILIES for name, rule in family.RULES.items()}
UNKNOWN = OpRule(not_understood)


def rule_for(node: Node) -> OpRule:
    """The record of a node's op; `UNKNOWN` where nothing is known."""
    rule = RULES.get(op_name(node))
    tagged = torch.Tag.pointwise in tags_of(node) and not mutates(node)
    return rule or (pointwise.POINTWISE if tagged else UNKNOWN)


def has_rule(node: Node) -> bool:
    """Whether the dims of a node's op are understood."""
    return rule_for(node).dims is not not_understood


def reads(node: Node) -> list[Node]:
    """The operands that `node` reads element by element."""
    return {Reads.ALL: operands_of(node), Reads.FIRST: operands_of(node)[:1], Reads.NONE: []}[rule_for(node).reads]


def draws_counter_based(node: Node) -> bool:
    """Whether `node` draws random numbers by counters, so that they are the same for any number of ranks."""
    draws = rule_for(node).draws if node.op == "call_function" else None
    return draws is not None and draws(node)


def draws_shared(node: Node) -> bool:
    """Whether `node` draws from the default generator, which then starts from the same seed on every rank."""
    rule = rule_for(node)
    by_counters = rule.draws is not None or rule.attention  # an attention's dropout is its site's
    return torch.Tag.nondeterministic_seeded in tags_of(node) and not by_counters
