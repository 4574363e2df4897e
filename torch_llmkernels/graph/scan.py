"""Whether a graph as Dynamo captured it could hold a region: one look at the names, before anything is traced."""

from __future__ import annotations

from torch import fx

WORDS = (
    "mm", "matmul", "linear", "einsum", "tensordot", "mv", "dot", "inner", "cdist", "corrcoef", "cov",
    "conv", "norm", "rsqrt", "softm", "attention", "entropy", "nll", "pool", "lstm", "gru", "rnn", "cosine",
    "sum", "mean", "max", "min", "var", "std", "loss",
)  # fmt: skip
"""Parts of the names of torch functions that contain an anchor once traced to ATen. Too many cost a trace, too few a swap.

Activations are left out: their backward is an anchor, but a graph that has nothing beside them is pointwise, and Inductor's.
"""


def might_match(gm: fx.GraphModule) -> bool:
    """Whether some call of the graph or its subgraphs may contain an operator that a pattern starts from."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(_suspicious(node) for graph in graphs for node in graph.nodes)


def _suspicious(node: fx.Node) -> bool:
    if node.op == "call_module":  # a module that Dynamo did not look into
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return any(word in name.lower() for word in WORDS)
