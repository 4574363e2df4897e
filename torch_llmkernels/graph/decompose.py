"""Which composite ATen operators stay whole through AOTAutograd, and their decomposition once the swaps are done.

Inductor's own table would take `native_layer_norm` or `_softmax` apart while it traces, and no region could be found by name.
So the operators that some pattern mentions are left out of the table that AOTAutograd gets. `late_decompose` takes apart what was
not swapped, node by node, with the table that Inductor would have used: what it compiles is then the graph it would have had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from torch_llmkernels.graph.patterns import pattern_ops

_NOT_COMPOSITE = ("aten.add.Tensor", "aten.add.Scalar")  # in the table for complex numbers only: an addition stays one


@functools.cache
def kept_operators() -> frozenset[torch._ops.OpOverload]:
    """The functional operators that some pattern mentions and that Inductor's table of the installed torch decomposes."""
    from torch._inductor.decomposition import decompositions

    mentioned = pattern_ops() - set(_NOT_COMPOSITE)
    return frozenset(op for op in decompositions if str(op) in mentioned and not op._schema.is_mutable)


class DecompTable(dict[Any, Callable[..., Any]]):
    """Inductor's decomposition table without the kept operators.

    It pickles as a reference to the function that builds it, because torch pickles the table into its compile-cache keys and
    a table of functions would make every graph uncacheable.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (decomp_table, ())


def decomp_table() -> DecompTable:
    """The table for AOTAutograd under the Inductor config in force: call it inside the config patch (`fallback_random`)."""
    from torch._inductor.decomposition import select_decomp_table

    kept = kept_operators()
    return DecompTable((op, fn) for op, fn in select_decomp_table().items() if op not in kept)


def late_decompose(graph: fx.Graph) -> int:
    """Decompose every kept operator that is still in `graph`, in place; returns how many there were.

    Each node is retraced on its own: retracing the whole graph would break operators that a trace may not see twice, such as
    `graphsafe_run_with_rng_state` of a checkpointed dropout.
    """
    return _late_pass().apply(graph)


@functools.cache
def _late_pass() -> Any:
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, PatternMatcherPass, register_graph_pattern

    late = PatternMatcherPass()
    for op in sorted(kept_operators(), key=str):
        register_graph_pattern(CallFunctionVarArgs(op), pass_dict=late)(_decompose_match)
    return late


def _decompose_match(match: Any, *args: Any, **kwargs: Any) -> None:
    """Replace the matched node by the trace of its operator under Inductor's table (literals stay literals)."""
    leaves, structure = torch.utils._pytree.tree_flatten((args, kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    target = match.nodes[0].target

    def call(*values: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(at, values, strict=True):
            filled[i] = value
        positional, keywords = torch.utils._pytree.tree_unflatten(filled, structure)
        return target(*positional, **keywords)

    match.replace_by_example(call, [leaves[i] for i in at], run_functional_passes=False)
