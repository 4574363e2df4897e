"""Arguments that a call does not look at: the random state of an attention's backward without dropout, and the running statistics
in the backward of a batch norm that trains.

An attention's forward hands its random state on whether or not it drew from it. The state's dtype, shape and device differ
between operators and releases (uint64 or int64, a pair or a scalar, a meta tensor while tracing), so a task does not name it: the
tensor of another argument stands there instead, which every one of these operators takes without dropout. Running statistics are
optional: nothing stands there, since no other tensor has their dtype in every mix of precisions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import fx

from torch_llmkernels.graph.calls import arguments, nodes_in, op_name
from torch_llmkernels.graph.patterns import PATTERNS, Call


@functools.cache
def _calls() -> Mapping[str, Call]:
    return {p.anchor.op: p.anchor for p in PATTERNS if isinstance(p.anchor, Call) and p.anchor.ignored}


def ignored_arguments(node: fx.Node) -> Mapping[str, str | None]:
    """Schema name of each argument that the call does not look at -> the argument that stands in for it, or None; often empty."""
    call = _calls().get(op_name(node))
    if call is None:
        return {}
    given = arguments(node)
    return call.ignored if all(given[name] == want for name, want in call.where.items()) else {}


def tensors_read(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, without those that it has only in arguments it does not look at."""
    ignored = ignored_arguments(node)
    if not ignored:
        return node.all_input_nodes
    return list(dict.fromkeys(n for name, value in arguments(node).items() if name not in ignored for n in nodes_in(value)))


def is_ignored(node: fx.Node) -> bool:
    """Whether no reader of a value looks at it."""
    return all(node not in tensors_read(user) for user in node.users)


def forget(node: fx.Node) -> None:
    """Give every reader of an ignored value the argument that stands in for it, so that what made the value can be dropped."""
    for user in list(node.users):
        given = arguments(user)
        ignored = ignored_arguments(user).items()
        stand_in = next(given[other] if other else None for name, other in ignored if given[name] is node)
        user.replace_input_with(node, stand_in)
