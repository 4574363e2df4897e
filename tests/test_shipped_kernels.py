"""The shipped library: every kernel parses and builds, and is right on shapes that its author never saw (CUDA's: on a GPU)."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from swapping import CORRECT
from torch import nn

import torch_llmkernels
from torch_llmkernels.cache.library import Library
from torch_llmkernels.capture import capture
from torch_llmkernels.errors import NotApplicable
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.run import evaluate
from torch_llmkernels.evaluation import ErrorStat, Evaluation, Record, Status
from torch_llmkernels.graph import op
from torch_llmkernels.kernels.device import facts_for_arch
from torch_llmkernels.kernels.launch import check_where, environment
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

ROOT = Path(__file__).parent.parent / "cache"
LIBRARY = Library(ROOT, strict=True)
FILES = sorted(p for p in ROOT.glob("*/*") if p.suffix in (".cu", ".cpp"))
RECORDS = sorted(LIBRARY.records(), key=lambda r: (r.device_kind, r.task.signature, r.task.key))

no_compiler = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_parses_and_lies_in_the_folder_of_what_it_implements(path: Path) -> None:
    kernel = parse_kernel(path.read_text(), path.stem)
    assert kernel.implements[0] == path.parent.name
    assert {"cuda": ".cu", "cpu": ".cpp"}[kernel.target] == path.suffix


def test_every_record_was_accepted_by_the_full_check() -> None:
    assert RECORDS
    for record in RECORDS:
        assert record.evaluation.status is Status.TIMED and record.evaluation.tier == "full", record.task.signature


def cuda_builds() -> list[tuple[Kernel, Task, dict[str, int]]]:
    """Every CUDA kernel: at its records' tasks, else at the first recorded task that it serves on an H100."""
    recorded = [r for r in RECORDS if r.task.device == "cuda"]
    found = [(parse_kernel(r.kernel_text, r.kernel_name), r.task, dict(r.constants)) for r in recorded]
    built = {kernel.digest for kernel, _, _ in found}
    for kernel in (parse_kernel(p.read_text(), p.stem) for p in FILES if p.suffix == ".cu"):
        if kernel.digest not in built:
            served = (r.task for r in recorded if r.task.signature in kernel.implements and kernel.why_not(r.task) is None)
            task, tunings = next((t, some) for t in served if (some := kernel.tunings(t, facts_for_arch("sm_90a"))))
            found.append((kernel, task, tunings[0]))
    return found


PORTABLE = (
    "conv2d.batch_norm.relu/register_tiles", "layer_norm/row_in_registers", "layer_norm/row_modes", "rms_norm/warp_per_row_ring",
    "scale.mask.softmax/lanes_per_row", "softmax/row_split",
)  # fmt: skip
"""The CUDA kernels that must build everywhere."""
UNSAID = (
    "attention/wgmma_ping_pong", "conv2d.batch_norm.add.relu/split_fp16_wgmma_pointwise",
    "conv2d.relu.max_pool2d/split_fp16_wgmma_im2col_pool", "conv2d.relu.max_pool2d/split_fp16_wgmma_walk",
    "conv2d.relu/split_fp16_wgmma_im2col", "conv2d/split_fp16_wgmma_pixels", "cross_entropy/online_rows",
    "layer_norm_backward/row_ahead_in_registers", "linear/split_fp16_wgmma", "linear/split_fp16_wgmma_registers",
    "softmax/cluster_bulk_copy",
)  # fmt: skip
"""CUDA kernels whose header leaves it to the compiler to refuse an architecture; a word in it would retire their records."""


def home(kernel: Kernel) -> str:
    return f"{kernel.implements[0]}/{kernel.name}"


def test_a_cuda_kernel_is_portable_or_says_what_it_needs() -> None:
    """A new one is listed as portable, or has `device.arch` in its header."""
    kernels = [parse_kernel(p.read_text(), p.stem) for p in FILES if p.suffix == ".cu"]
    silent = [home(k) for k in kernels if not any("device.arch" in condition.names for condition in k.where)]
    assert sorted(silent) == sorted(PORTABLE + UNSAID)


@pytest.mark.parametrize(("kernel", "task", "constants"), cuda_builds(), ids=lambda v: getattr(v, "name", getattr(v, "key", "")))
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
def test_a_cuda_kernel_builds_for_its_task(kernel: Kernel, task: Task, constants: dict[str, int], arch: str) -> None:
    """Or says, itself or by the compiler, that it is written for another architecture; every record is of sm_90a.

    A portable one that some architecture refuses has lost something; one that turns out to be portable is to stay so.
    """
    if reason := _nvrtc_missing():
        pytest.skip(reason)
    facts = facts_for_arch(arch)
    try:
        names = environment(kernel, task, constants, facts)
        check_where(dataclasses.replace(kernel, where=tuple(c for c in kernel.where if "device.arch" in c.names)), names)
        binary = target_for("cuda").compile(kernel, task, constants, facts)
    except NotApplicable as refusal:
        assert arch != "sm_90a" and home(kernel) not in PORTABLE, refusal
        assert re.search("another architecture" if home(kernel) in UNSAID else r"device\.arch", str(refusal)), refusal
        return
    assert home(kernel) in PORTABLE or arch in ("sm_90a", "sm_100a"), "add it to PORTABLE"
    assert binary.resources.registers and binary.resources.registers <= 255


def _nvrtc_missing() -> str:
    from torch_llmkernels.errors import ToolchainMissing
    from torch_llmkernels.kernels import nvrtc

    try:
        nvrtc.prelude()
        import cuda.bindings.nvrtc  # noqa: F401
    except (ImportError, ToolchainMissing) as error:
        return str(error)
    return ""


# Shapes with tails, other ranks and other parameters than those the searches were run for; long sums, which one running sum would
# round too often to be as accurate as eager.
UNSEEN = {
    "layer_norm": [(nn.LayerNorm(33), (7, 33)), (nn.LayerNorm(160), (2, 5, 160)), (nn.LayerNorm(1027), (3, 1027))],
    "softmax": [(nn.Softmax(-1), (5, 17)), (nn.Softmax(-1), (2, 3, 129)), (nn.Softmax(-1), (4, 3001))],
    "conv2d.relu.max_pool2d": [
        (nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 15, 18)),
        (nn.Sequential(nn.Conv2d(4, 33, 5, stride=2, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2)), (1, 4, 37, 29)),
        (nn.Sequential(nn.Conv2d(7, 33, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)), (1, 7, 21, 10)),
        (nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (3, 1, 9, 9)),
    ],
    "conv2d": [
        (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 15, 18)),
        (nn.Conv2d(6, 17, (5, 3), stride=(2, 1), bias=False), (1, 6, 21, 13)),
        (nn.Conv2d(8, 24, 1), (3, 8, 7, 9)),
        (nn.Conv2d(5, 40, 3, padding=1, bias=False), (2, 5, 11, 31)),
        (nn.Conv2d(512, 33, 3, padding=1), (1, 512, 7, 7)),
    ],
    "linear.gelu": [
        (nn.Sequential(nn.Linear(31, 65), nn.GELU()), (13, 31)),
        (nn.Sequential(nn.Linear(128, 48), nn.GELU()), (2, 9, 128)),
        (nn.Sequential(nn.Linear(200, 333), nn.GELU()), (77, 200)),
        (nn.Sequential(nn.Linear(4100, 70), nn.GELU()), (61, 4100)),
    ],
}


class Attention(nn.Module):
    """q, k and v as they come out of one projection: strided views."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = x.view(batch, tokens, 3, 2, width // 6).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


UNSEEN["attention"] = [
    (Attention(), (2, 19, 192)), (Attention(), (1, 130, 96)), (Attention(), (1, 64, 384)),
    (Attention(), (1, 1027, 192)),
]  # fmt: skip
BACKWARD = {"layer_norm_backward": UNSEEN["layer_norm"]}


def tasks_of(signature: str) -> list[Task]:
    """The unseen tasks of a signature, captured from modules as a user would write them."""
    training = signature in BACKWARD
    found = []
    for module, shape in (BACKWARD if training else UNSEEN).get(signature, []):
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=training)
        found += [r.task for r in capture(module, [x], training=training) if r.task.signature == signature]
    return found


# The same for CUDA, whose products want rows that start at multiples of 16 bytes; the images of half precision are channels-last.
UNSEEN_CUDA = {
    "layer_norm": [(nn.LayerNorm(1027), (3, 1027)), (nn.LayerNorm(1032), (7, 1032)), (nn.LayerNorm(20000), (5, 20000))],
    "softmax": UNSEEN["softmax"],
    "conv2d": [
        (nn.Conv2d(24, 40, 3, padding=1), (2, 24, 11, 31)), (nn.Conv2d(64, 33, 3, padding=1), (1, 64, 7, 7)),
        (nn.Conv2d(16, 72, 1, bias=False), (3, 16, 9, 5)), (nn.Conv2d(32, 64, (3, 5), stride=2, padding=1), (2, 32, 21, 13)),
        (nn.Conv2d(9, 9, (5, 3), stride=(2, 1), padding=1, groups=9), (2, 9, 19, 21)),
    ],
    "conv2d.relu.max_pool2d": [
        (nn.Sequential(nn.Conv2d(16, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (2, 16, 22, 34)),
        (nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (1, 64, 14, 18)),
        (nn.Sequential(nn.Conv2d(32, 96, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (3, 32, 10, 12)),
        (nn.Sequential(nn.Conv2d(3, 40, 11, 4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)), (2, 3, 66, 98)),
    ],
    "linear": [
        (nn.Linear(132, 77), (45, 132)), (nn.Linear(264, 160, bias=False), (3, 37, 264)), (nn.Linear(4104, 96), (61, 4104)),
        (nn.Linear(136, 288), (129, 136)),
    ],
    "linear.gelu": [
        (nn.Sequential(nn.Linear(264, 160), nn.GELU()), (3, 37, 264)),
        (nn.Sequential(nn.Linear(136, 288), nn.GELU()), (129, 136)),
        (nn.Sequential(nn.Linear(520, 1056), nn.GELU()), (257, 520)),
    ],
    "attention": [
        (Attention(), (2, 19, 384)), (Attention(), (1, 130, 384)), (Attention(), (3, 257, 384)), (Attention(), (2, 77, 384)),
        (Attention(), (4, 33, 384)),
    ],
    "layer_norm_backward": [(nn.LayerNorm(160), (2, 5, 160)), (nn.LayerNorm(1032), (7, 1032)), (nn.LayerNorm(4096), (131, 4096))],
}  # fmt: skip
FLOATS = ["float32", "float16", "bfloat16"]


def cuda_tasks(signature: str, dtype: str, device: str) -> list[Task]:
    """The unseen tasks of a signature on CUDA; from a `device` without one, the tasks of its CPU with another device's name."""
    found, training = [], signature in BACKWARD
    for module, shape in UNSEEN_CUDA[signature]:
        torch.manual_seed(0)
        layout = torch.channels_last if len(shape) == 4 and dtype != "float32" else torch.preserve_format
        module = copy.deepcopy(module).to(device, getattr(torch, dtype)).to(memory_format=layout)
        x = torch.randn(shape).to(device, getattr(torch, dtype)).to(memory_format=layout).requires_grad_(training)
        with torch.set_grad_enabled(training):
            regions = capture(module, [x], training=training)
        found += [dataclasses.replace(r.task, device="cuda") for r in regions if r.task.signature == signature]
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("signature", UNSEEN_CUDA)
def test_some_cuda_kernel_serves_each_unseen_shape(signature: str, dtype: str) -> None:
    """So that the test on a GPU does not pass for want of something to check."""
    facts, unserved = facts_for_arch("sm_90a"), []
    for task in (tasks := cuda_tasks(signature, dtype, "cpu")):
        kernels = [k for k in LIBRARY.kernels(signature, "cuda") if k.why_not(task) is None and k.tunings(task, facts)]
        unserved += [] if kernels else [task]
    assert len(tasks) - len(unserved) >= 3, [[t.shape for t in task.inputs] for task in unserved]


ROUNDINGS = 4.0
"""A relative error in float32 of up to this many times its epsilon is rounding."""
OVERFLOWS = dict.fromkeys(
    [("wgmma_ping_pong", "bfloat16"), ("wgmma_split_last_round", "bfloat16")],
    "distribution wide",
)
"""Where a kernel is known to be refused: exponents so wide that its sums, not divided yet, pass the largest number."""


def is_right(outcome: Evaluation, kernel: Kernel, dtype: str = "float32") -> bool:
    """Correct, or refused for what says nothing about its code.

    Whether an error of a few roundings is about as small as eager's depends on eager: on the machine's own products, and the
    order in which they sum. There a kernel may be refused, as a user's verification on that machine would.
    """
    if outcome.status in (Status.CORRECT, Status.NOT_APPLICABLE):
        return True
    if (known := OVERFLOWS.get((kernel.name, dtype))) and outcome.status is Status.WRONG and known in outcome.detail:
        return True
    rounded = all(e.frobenius <= ROUNDINGS * torch.finfo(torch.float32).eps for e in outcome.errors)
    by_error = outcome.status is Status.WRONG and "times the error allowed" in outcome.detail
    return dtype == "float32" and by_error and bool(outcome.errors) and rounded


@pytest.mark.parametrize(
    ("detail", "error", "dtype", "right"),
    [
        ("output y, distribution normal: 1.27 times the error allowed", 2.6e-7, "float32", True),
        ("output y, distribution normal: 1.27 times the error allowed", 2.6e-7, "float16", False),
        ("output y, distribution normal: 9.1 times the error allowed", 2.6e-6, "float32", False),
        ("output y[0, 1]: got nan where eager gives 0; 7 of 64 elements differ in being NaN or infinite", 0.0, "float32", False),
    ],
)
def test_only_rounding_is_left_to_the_machine(detail: str, error: float, dtype: str, right: bool) -> None:
    kernel = LIBRARY.kernels("linear", "cuda")[0]
    stat = ErrorStat("y", "normal", error, 2e-7, 0, 0, 0, 0, False)
    assert is_right(Evaluation(Status.WRONG, errors=(stat,), detail=detail), kernel, dtype) is right


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("signature", UNSEEN_CUDA)
def test_a_cuda_kernel_is_right_on_shapes_its_author_never_saw(signature: str, dtype: str) -> None:
    outcomes = [
        (kernel, [t.shape for t in task.inputs], evaluate(Job(task, kernel.text, kernel.name, timed=False)))
        for task in cuda_tasks(signature, dtype, "cuda")
        for kernel in LIBRARY.kernels(signature, "cuda")
        if kernel.why_not(task) is None
    ]
    assert not [(kernel.name, shapes, o.status, o.detail) for kernel, shapes, o in outcomes if not is_right(o, kernel, dtype)]
    assert sum(o.status is Status.CORRECT for _, _, o in outcomes) >= 3, outcomes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_misaligned_input_on_a_gpu_runs_the_reference_and_is_right(tmp_path: Path) -> None:
    options = {"swap": "correct", "cache_dir": str(tmp_path / "store"), "verify_budget_s": 600.0}
    norm = nn.LayerNorm(1024, device="cuda")
    compiled = torch.compile(norm, backend="llmkernels", dynamic=False, options=options)
    storage = torch.randn(16 * 1024 + 1, device="cuda")
    with torch.no_grad():
        for offset in (0, 1):
            x = storage[offset : offset + 16 * 1024].view(16, 1024)
            torch.testing.assert_close(compiled(x), norm(x))


CPU = [(s, k) for s in LIBRARY.signatures() for k in LIBRARY.kernels(s, "cpu")]


@no_compiler
@pytest.mark.parametrize(("signature", "kernel"), CPU, ids=lambda v: v if isinstance(v, str) else v.name)
def test_a_cpu_kernel_is_right_on_shapes_its_author_never_saw(signature: str, kernel: Kernel) -> None:
    served = [task for task in tasks_of(signature) if kernel.why_not(task) is None]
    outcomes = [evaluate(Job(task, kernel.text, kernel.name, timed=False)) for task in served]
    assert not [(o.status, o.detail) for o in outcomes if not is_right(o, kernel)]
    assert sum(o.status is Status.CORRECT for o in outcomes) >= 2, [o.detail for o in outcomes]


@no_compiler
def test_forward_fused_and_backward_regions_run_swapped(tmp_path: Path) -> None:
    """`swap="correct"` takes every kernel that is right, fast or not: so "never swapped" cannot pass for working."""
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(96), torch.randn(24, 96, requires_grad=True)
    fused, image = UNSEEN["conv2d.relu.max_pool2d"][0][0], torch.randn(2, 3, 15, 18)
    options = {"swap": "correct", "strict": True, "cache_dir": str(tmp_path / "store"), "verify_budget_s": 600.0}
    compiled = torch.compile(norm, backend="llmkernels", dynamic=False, options=options)
    compiled(x).square().sum().backward()
    got = [x.grad.clone(), *(p.grad.clone() for p in norm.parameters())]
    x.grad = None
    norm.zero_grad()
    norm(x).square().sum().backward()
    for mine, eager in zip(got, [x.grad, *(p.grad for p in norm.parameters())], strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = torch.compile(nn.LayerNorm(96), backend="llmkernels", dynamic=False, options=options)
        torch.testing.assert_close(plain(x.detach()), F.layer_norm(x, (96,)), rtol=1e-4, atol=1e-4)
        both = torch.compile(fused, backend="llmkernels", dynamic=False, options=options)
        torch.testing.assert_close(both(image), fused(image))
    swapped = {r.signature for g in torch_llmkernels.report() for r in g.regions if r.swapped}
    assert {"layer_norm", "layer_norm_backward", "conv2d.relu.max_pool2d"} <= swapped, torch_llmkernels.report()


def placed(values: torch.Tensor, stride: tuple[int, ...], offset: int) -> torch.Tensor:
    """A copy of values at an address that is `offset` bytes beyond a multiple of 256."""
    count = 1 + sum((size - 1) * step for size, step in zip(values.shape, stride, strict=True))
    if values.device.type == "cuda":  # its views start at whole elements
        memory = torch.empty(count * values.itemsize + 512, dtype=torch.uint8, device=values.device)
        start = -memory.data_ptr() % 256 + offset
        found = memory[start : start + count * values.itemsize].view(values.dtype).as_strided(values.shape, stride)
    else:
        buffer = bytearray(count * values.itemsize + 512)
        start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 256 + offset
        found = torch.frombuffer(buffer, dtype=values.dtype, count=count, offset=start).as_strided(values.shape, stride)
    assert found.data_ptr() % 256 == offset
    return found.copy_(values)


def serves_addresses_of_its_header(kernel: Kernel, task: Task, store: Path) -> None:
    """Inputs, outputs and workspaces together: a vector access that wants more than `align` says would end the process."""
    device, facts = torch.device(task.device), target_for(task.device).facts()
    constants = kernel.tunings(task, facts)[0]
    record = Record(task, kernel.name, kernel.text, tuple(constants.items()), facts.kind, CORRECT, "test")
    slot = op.Slot(op.decode_spec(op.encode_spec(record)), Settings(cache_dir=str(store)))
    torch.manual_seed(0)
    inputs = [torch.randn(spec.shape).to(device, getattr(torch, spec.dtype)) for spec in task.inputs]
    empty = [torch.full(spec.shape, torch.nan, dtype=getattr(torch, spec.dtype), device=device) for spec in task.outputs]
    expected = [torch.empty_like(output) for output in empty]
    slot.run_reference(*expected, *slot.workspaces(device), *inputs)
    largest = max(value.itemsize for value in (*inputs, *empty))
    cases = [(0, 0), (kernel.align, 0), (kernel.align // 2, 1)]
    for offset, references in cases if device.type == "cpu" else [c for c in cases if c[0] % largest == 0]:
        outputs = [placed(value, spec.stride, offset) for value, spec in zip(empty, task.outputs, strict=True)]
        scratch = [placed(made, made.stride(), offset) for made in slot.workspaces(device)]
        given = [placed(value, spec.stride, offset) for value, spec in zip(inputs, task.inputs, strict=True)]
        with mock.patch.object(op.Slot, "run_reference", autospec=True, side_effect=op.Slot.run_reference) as reference:
            slot(*outputs, *scratch, *given)
        assert reference.call_count == references, (kernel.name, offset, slot.reason)
        for got, want in zip(outputs, expected, strict=True):
            limit = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[got.dtype]
            torch.testing.assert_close(got, want, rtol=limit, atol=limit * max(1.0, want.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("signature", UNSEEN_CUDA)
def test_a_cuda_kernel_serves_addresses_of_its_header_and_leaves_others_to_the_reference(
    signature: str, dtype: str, tmp_path: Path
) -> None:
    facts, tried = target_for("cuda").facts(), 0
    tasks = cuda_tasks(signature, dtype, "cuda")
    for kernel in LIBRARY.kernels(signature, "cuda"):
        task = next((t for t in tasks if kernel.why_not(t) is None and kernel.tunings(t, facts)), None)
        if task is not None:
            serves_addresses_of_its_header(kernel, task, tmp_path)
            tried += 1
    assert tried


@no_compiler
@pytest.mark.parametrize(("signature", "kernel"), CPU, ids=lambda v: v if isinstance(v, str) else v.name)
def test_a_cpu_kernel_serves_addresses_of_its_header_and_leaves_others_to_the_reference(
    signature: str, kernel: Kernel, tmp_path: Path
) -> None:
    task = next(task for task in tasks_of(signature) if kernel.why_not(task) is None)
    serves_addresses_of_its_header(kernel, task, tmp_path)


@no_compiler
def test_an_input_that_starts_one_element_later_is_right_in_a_compiled_model(tmp_path: Path) -> None:
    options = {"swap": "correct", "cache_dir": str(tmp_path / "store"), "verify_budget_s": 600.0}
    norm = nn.LayerNorm(64)
    compiled = torch.compile(norm, backend="llmkernels", dynamic=False, options=options)
    storage = torch.randn(16 * 64 + 1)
    with torch.no_grad():
        for offset in (0, 1):
            x = storage[offset : offset + 16 * 64].view(16, 64)
            torch.testing.assert_close(compiled(x), norm(x))
