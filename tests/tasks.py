"""Small tasks built by hand, as the graph stage would build them. A symbolic size: `rows="d0", hints={"d0": 8}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_llmkernels.task import Dim, Node, Numerics, Task, TensorSpec


def contiguous(name: str, dtype: str, shape: Sequence[Dim]) -> TensorSpec:
    """A row-major tensor; strides over symbolic sizes become expressions."""
    strides: list[Dim] = []
    running: Dim = 1
    for size in reversed(shape):
        strides.append(running)
        running = _times(size, running)
    return TensorSpec(name, dtype, tuple(shape), tuple(reversed(strides)))


def _times(size: Dim, running: Dim) -> Dim:
    if isinstance(size, int) and isinstance(running, int):
        return size * running
    if running == 1:
        return size
    return f"{running}*{size}"


def _symbols(hints: Mapping[str, int] | None) -> tuple[tuple[str, int], ...]:
    return tuple((hints or {}).items())


def layer_norm_task(
    rows: Dim = 8, cols: int = 64, dtype: str = "float32", device: str = "cpu", *, weight: bool = True, bias: bool = True,
    stats: bool = False, eps: float = 1e-5, hints: Mapping[str, int] | None = None,
) -> Task:  # fmt: skip
    """`layer_norm` of x [rows, cols] over the last dimension: output y, and with `stats` mean and rstd [rows, 1]."""
    stat_dtype = "float64" if dtype == "float64" else "float32"
    inputs = [contiguous("x", dtype, (rows, cols))]
    inputs += [contiguous("weight", dtype, (cols,))] if weight else []
    inputs += [contiguous("bias", dtype, (cols,))] if bias else []
    outputs = [contiguous("y", dtype, (rows, cols))]
    outputs += [contiguous("mean", stat_dtype, (rows, 1)), contiguous("rstd", stat_dtype, (rows, 1))] if stats else []
    affine = ({"v": "weight"} if weight else None, {"v": "bias"} if bias else None)
    args = ({"v": "x"}, {"p": "normalized_shape"}, *affine, {"p": "eps"})
    program = [Node("n0", "aten.native_layer_norm.default", args)]
    program += [Node(f"n{i + 1}", "getitem", ({"v": "n0"}, i)) for i in range(len(outputs))]
    return Task(
        "layer_norm", tuple(program), tuple(inputs), tuple(outputs), tuple(f"n{i + 1}" for i in range(len(outputs))),
        (("eps", eps), ("normalized_shape", (cols,))), Numerics(), device, _symbols(hints),
    )  # fmt: skip


def softmax_task(
    rows: Dim = 8, cols: int = 64, dtype: str = "float32", device: str = "cpu", *, hints: Mapping[str, int] | None = None
) -> Task:
    """`softmax` of x [rows, cols] over the last dimension: output y."""
    program = (Node("n0", "aten._softmax.default", ({"v": "x"}, {"p": "dim"}, False)),)
    return Task(
        "softmax", program, (contiguous("x", dtype, (rows, cols)),), (contiguous("y", dtype, (rows, cols)),), ("n0",),
        (("dim", -1),), Numerics(), device, _symbols(hints),
    )  # fmt: skip


def relu_add_task(
    size: Dim = 1024, dtype: str = "float32", device: str = "cpu", *, hints: Mapping[str, int] | None = None
) -> Task:
    """`add.relu`: y = relu(a + b) of vectors of `size` elements."""
    program = (
        Node("n0", "aten.add.Tensor", ({"v": "a"}, {"v": "b"}, 1)),
        Node("n1", "aten.relu.default", ({"v": "n0"},)),
    )
    inputs = (contiguous("a", dtype, (size,)), contiguous("b", dtype, (size,)))
    return Task("add.relu", program, inputs, (contiguous("y", dtype, (size,)),), ("n1",), (), Numerics(), device, _symbols(hints))


def matmul_task(
    m: Dim = 128, n: int = 128, k: int = 64, dtype: str = "float16", device: str = "cuda", *, b_transposed: bool = False,
    hints: Mapping[str, int] | None = None,
) -> Task:  # fmt: skip
    """`matmul`: y [m, n] = a [m, k] @ b [k, n]; with `b_transposed` b is the transpose of a row-major [n, k] tensor."""
    b = TensorSpec("b", dtype, (k, n), (1, k)) if b_transposed else contiguous("b", dtype, (k, n))
    program = (Node("n0", "aten.mm.default", ({"v": "a"}, {"v": "b"})),)
    outputs = (contiguous("y", dtype, (m, n)),)
    return Task("matmul", program, (contiguous("a", dtype, (m, k)), b), outputs, ("n0",), (), Numerics(), device, _symbols(hints))
