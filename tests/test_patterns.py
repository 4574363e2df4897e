"""The pattern table is consistent with the operators it names."""

from __future__ import annotations

import pytest

from torch_llmkernels.graph.patterns import PATTERNS, Call, Pattern, Stage, Tree, anchor_ops, pattern_ops
from torch_llmkernels.program import operator_of


def calls(pattern: Pattern) -> list[Call]:
    stages: list[Stage] = [*pattern.before, *pattern.after]
    anchor = [] if isinstance(pattern.anchor, Tree) else [pattern.anchor]
    return anchor + [call for stage in stages for call in stage.calls]


ALL = {id(c): c for p in PATTERNS for c in calls(p)}.values()


@pytest.mark.parametrize("call", ALL, ids=lambda c: f"{c.op}-{c.label}")
def test_every_argument_that_a_pattern_names_is_in_the_schema(call: Call) -> None:
    schema = operator_of(call.op)._schema
    known = {a.name for a in schema.arguments}
    stand_ins = filter(None, call.ignored.values())
    assert {*call.chain, *call.roles, *call.where, *call.params, *call.ignored, *stand_ins} <= known
    assert len(call.outputs) <= len(schema.returns)
    assert all(i < len(schema.returns) for i in call.unused)


@pytest.mark.parametrize("call", ALL, ids=lambda c: f"{c.op}-{c.label}")
def test_roles_are_identifiers_and_distinct_within_a_call(call: Call) -> None:
    outputs = [role for role in call.outputs if role]
    assert all(name.isidentifier() for name in (*call.roles.values(), *outputs, *call.params.values()))
    assert len(set(outputs)) == len(outputs)


def test_no_role_is_named_above_an_anchor_and_below() -> None:
    """Both sides are matched on their own: two tensors of one role would be one input."""
    for pattern in PATTERNS:
        above, below = (
            {role for stage in stages for call in stage.calls for role in call.roles.values()}
            for stages in (pattern.before, pattern.after)
        )
        assert not above & below


def test_no_two_patterns_have_the_same_anchor_and_stages() -> None:
    seen = []
    for p in PATTERNS:
        stages = [c.label + c.op for s in p.before + p.after for c in s.calls]
        seen.append((p.anchor.label, str(getattr(p.anchor, "root", p.anchor.op)), *stages))
    assert len(set(seen)) == len(seen)


def test_pattern_ops_exist_and_include_the_anchors() -> None:
    assert anchor_ops() <= pattern_ops()
    assert all(operator_of(op) for op in pattern_ops())
