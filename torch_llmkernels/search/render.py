"""Prompts: the texts in `prompts/` filled with what is known about the task, the device and the search so far.

Every function here is pure: the same tree gives the same prompt, which is what lets a resumed search recognise its own questions.
Text that a user or a model wrote is fenced, and the prompts say that a fence holds data.
"""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

from torch_llmkernels.evaluation import Evaluation, KernelResources
from torch_llmkernels.search.formulas import formulas_of
from torch_llmkernels.search.ideas import FAMILIES
from torch_llmkernels.search.run import Goal
from torch_llmkernels.search.tree import Candidate, IdeaNode, Prompt, Tree, place
from torch_llmkernels.task import ITEMSIZE, Task, TensorSpec

MAX_DETAIL = 6000  # characters of a compiler log or check report
MOST_TUNINGS = 32  # as `evaluate.run` has it, which imports torch
MAX_HISTORY = 60  # ideas listed in a prompt: all the latest, then the best of the earlier ones

_SPLIT = "<!-- request -->"

_IMPROVE = "at least one is a safe improvement of what exists, and at least one is a different design of the whole kernel"
_INVENT = "each is a complete design, as different from the others as can be; at least one is plain and safe"
_IMPROVE_ONE = "it improves what exists or is a different design of the whole kernel, whichever promises more"
_INVENT_ONE = "it is a complete design"
_REBUILD = "Implement the idea in full; keep what is good in the kernel to start from, and rebuild the rest around it freely."
_FROM_SCRATCH = "Implement the idea in full; take over from kernels that are shown above what helps."


def ideas_prompt(goal: Goal, tree: Tree, seed: Candidate | None, number: int) -> tuple[str, str]:
    """The system text and the request for the ideas of one seed.

    Args:
        goal: The search.
        tree: Its state when the round began.
        seed: The kernel to improve; None asks for first designs.
        number: The round, from 1.
    """
    return _render(
        "ideas.md", goal, tree, round=number, rounds=goal.settings.rounds, mix=_mix(goal.settings.ideas, seed),
        count="1 idea" if goal.settings.ideas == 1 else f"{goal.settings.ideas} ideas, each a different mechanism",
        start=start_section(goal, tree, seed), history=history_section(tree, number),
    )  # fmt: skip


def _mix(count: int, seed: Candidate | None) -> str:
    """What the ideas must be between them; of a single idea no mixture can be asked."""
    if count == 1:
        return f"{_IMPROVE_ONE if seed else _INVENT_ONE}; it belongs to one of these families: {'; '.join(FAMILIES)}"
    spread = f"spread them over the families, where the bottleneck allows: {'; '.join(FAMILIES)}"
    return f"{_IMPROVE if seed else _INVENT};\n- {spread}"


def code_prompt(goal: Goal, tree: Tree, node: IdeaNode, variant: int) -> tuple[str, str]:
    """The system text and the request for one implementation of an idea."""
    seed = tree.candidates.get(node.seed)
    return _render(
        "candidate.md", goal, tree, start=start_section(goal, tree, seed), idea=idea_section(node),
        freedom=_REBUILD if seed else _FROM_SCRATCH, variation=_variation(variant, goal.settings.variants),
    )  # fmt: skip


def repair_prompt(goal: Goal, tree: Tree, failed: Prompt, reason: str) -> tuple[str, str]:
    """The system text and the request that follow an attempt that failed."""
    if failed.role == "ideas":
        seed = tree.candidates.get(failed.seed)
        system, request = ideas_prompt(goal, tree, seed, failed.round)
        return system, f"{request}\n\n## Your earlier answer could not be used\n{fence(reason)}\n"
    node = tree.ideas[failed.idea]
    candidate = tree.candidates.get(failed.candidate)
    source = fence(candidate.text if candidate else (failed.reply or "")[-MAX_DETAIL:], "cpp")
    return _render(
        "repair.md", goal, tree, idea=idea_section(node), source=source, reason=fence(_clip(reason)), attempt=failed.attempt + 1
    )


def example(target: str) -> str:
    """The worked example of a kernel file for a target."""
    return _file("example_cuda.cu" if target == "cuda" else "example_cpu.cpp")


def _render(name: str, goal: Goal, tree: Tree, **values: Any) -> tuple[str, str]:
    target = goal.task.device
    products = _file("target_cuda_products.md") if _has_products(goal.task) else ""
    parts = {
        "target": fill(_file(f"target_{target}.md"), products=products),
        "example": fence(example(target), "cpp"),
        "prelude": fence(prelude(target), "cpp"),
        "tunings": MOST_TUNINGS,
    }
    shared = {
        "format": fill(_file("format.md"), **parts),
        "rules": _file("rules.md"),
        "task": task_section(goal.task) + notes_section(goal),
        "device": device_section(goal, tree),
        "floor": floor_section(goal, tree),
    }
    system, _, request = _file(name).partition(_SPLIT)
    return tuple(fill(part, **shared, **values).strip() + "\n" for part in (system, request))


def fill(template: str, **values: Any) -> str:
    """`{{name}}` replaced by `values[name]`; replaced text is not looked at again.

    Raises:
        KeyError: for a name that has no value.
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), template)


@functools.cache
def _file(name: str) -> str:
    return (resources.files("torch_llmkernels.search") / "prompts" / name).read_text(encoding="utf-8")


@functools.cache
def prelude(target: str) -> str:
    """What every kernel of a target sees before its own source, read from the prelude itself."""
    name = "prelude.cuh" if target == "cuda" else "prelude.hpp"
    return (resources.files("torch_llmkernels.kernels") / name).read_text(encoding="utf-8")


def fence(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any in the text, so that the text cannot end it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def task_section(task: Task) -> str:
    """The reference program, every tensor, the parameters and the numerics policy."""
    from torch_llmkernels.program import python_source

    source = python_source(task)
    lines = [
        f"Signature (for `implements`): `{_cell(task.signature)}`",
        "",
        "Reference, as PyTorch:",
        fence(_without_comments(source), "python"),
        "",
    ]
    if formulas := formulas_of(task, source):
        lines += [_FORMULAS, fence("\n".join(formulas), "python"), ""]
    lines += ["| tensor | role | dtype | shape | stride (elements) | notes |", "|---|---|---|---|---|---|"]
    lines += [_tensor_row(t, "input", t.name in task.constant) for t in task.inputs]
    lines += [_tensor_row(t, "output", False) for t in task.outputs]
    if task.params:
        lines += ["", "Parameters: " + ", ".join(f"`{name}` = {value!r}" for name, value in task.params)]
    if task.symbols:
        named = ", ".join(f"`{name}` (now {value})" for name, value in task.symbols)
        lines += ["", f"Dynamic sizes, which change from call to call and so may never be compile-time constants: {named}"]
    lines += ["", _numerics(task)]
    return "\n".join(lines)


def _without_comments(source: str) -> str:
    """The program without its descriptions of tensors and sizes: the table below it has them."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("    # "))


_FORMULAS = (
    "What the calls of `torch.ops` compute. Eager computes half precision in float32 and rounds each result once, unless a "
    "comment says otherwise; saved statistics are read as they are, in the dtype that the table gives:"
)


def notes_section(goal: Goal) -> str:
    """What the person who started the search added, as data; empty if nothing."""
    if not goal.notes:
        return ""
    return f"\n\nNotes of the person who started this search (what else to serve, what is known):\n{fence(goal.notes)}"


def _tensor_row(spec: TensorSpec, role: str, constant: bool) -> str:
    notes = ["contiguous"] if spec.is_contiguous else ["strides as given, not row-major"]
    if constant:
        notes.append("constant for the compiled graph (`[[prepare]]` may pack it once)")
    if all(isinstance(size, int) for size in spec.shape):
        total = ITEMSIZE[spec.dtype]
        for size in spec.shape:
            total *= size
        notes.append(f"{_bytes(total)}")
    return f"| `{spec.name}` | {role} | {spec.dtype} | {list(spec.shape)} | {list(spec.stride)} | {', '.join(notes)} |"


_PRODUCTS = {
    "ieee": "float32 products keep full float32 accuracy, so plain TF32 or half-precision products are too coarse; an "
    "error-compensated split over tensor cores is welcome where its error is no larger than eager's",
    "tf32": "float32 products may be computed in TF32",
    "bf16": "float32 products may be computed in bfloat16",
}


def _has_products(task: Task) -> bool:
    """Whether the program multiplies matrices, so that tensor cores matter."""
    return any(part in node.op for node in task.program for part in ("convolution", "mm", "attention"))


def _numerics(task: Task) -> str:
    policy, lines = task.numerics, []
    conv = any("convolution" in node.op for node in task.program)
    if _has_products(task):
        lines.append(f"Numerics policy: {_PRODUCTS[policy.conv if conv else policy.matmul]}.")
        if policy.reduced_precision_reduction:
            lines.append("Half-precision products may accumulate in half precision.")
    if policy.deterministic:
        lines.append("Two runs must agree bit for bit: no floating-point atomics, no order that depends on timing.")
    return " ".join(lines)


_LABELS: dict[str, dict[str, str]] = {
    "cuda": {
        "name": "device", "arch": "architecture", "sms": "multiprocessors",
        "smem_per_block": "shared memory a block may opt in to (bytes)", "l2_bytes": "L2 cache (bytes)",
        "threads": "most threads of a block", "max_threads_per_sm": "resident threads of a multiprocessor",
        "regs_per_sm": "32-bit registers of a multiprocessor", "memory_bytes": "memory (bytes)",
    },
    "cpu": {
        "name": "processor", "arch": "instruction set", "threads": "threads (cores that may be used)",
        "l2_bytes": "L2 cache of one core (bytes)", "memory_bytes": "memory (bytes)",
    },
}  # fmt: skip


_CEILINGS = {
    "cuda": (
        ("copy", "memory bandwidth, bytes read plus written", "GB/s", 1e9),
        ("fp32", "strict float32 matrix product", "TFLOP/s", 1e12),
        ("tf32", "float32 matrix product with TF32 allowed", "TFLOP/s", 1e12),
        ("fp16", "float16 matrix product on tensor cores", "TFLOP/s", 1e12),
    ),
    "cpu": (
        ("copy", "memory bandwidth, bytes read plus written", "GB/s", 1e9),
        ("cache", "the same while the data stays in cache, all threads", "GB/s", 1e9),
        ("fp32", "float32 matrix product, all threads", "GFLOP/s", 1e9),
    ),
}


def device_section(goal: Goal, tree: Tree) -> str:
    """The device's facts, and the ceilings that were measured on it: those that `floor_section` rests on."""
    target, later = goal.task.device, _later(goal, tree)
    labels = _LABELS[target]
    lines = [f"- {labels[name]}: {goal.facts[name]}" for name in labels if goal.facts.get(name)]
    measured = [
        (words, later.get(name, goal.ceilings[name]) / scale, unit, name in later)
        for name, words, unit, scale in _CEILINGS[target]
        if goal.ceilings.get(name) and (name != "cache" or goal.ceilings["cache"] != goal.ceilings.get("copy"))
    ]
    if measured:
        beaten = goal.floor_ms and not tree.floor_ms(goal.floor_ms)
        meaning = " in a slow moment (a kernel was faster than they allow)" if beaten else ", so ceilings in practice"
        lines += ["", f"Measured here with simple programs{meaning}:"]
        note = " (at least, as measured beside a later evaluation, when the machine was faster)"
        lines += [f"- {words}: {value:.4g} {unit}{note if new else ''}" for words, value, unit, new in measured]
    return "\n".join(lines)


def _later(goal: Goal, tree: Tree) -> dict[str, float]:
    """The bandwidth that the floor implies, by the name of its ceiling, where a later evaluation measured a higher one.

    A journal holds the floor of every evaluation but the ceilings of the first moment only, and the two must not contradict each
    other in a prompt. A floor that arithmetic bounds may rest on several rates, so nothing is read off it.
    """
    floor, before = tree.floor_ms(goal.floor_ms), goal.floor_ms
    if goal.floor.get("bound") != "bytes" or not 0 < floor < before * 0.99:
        return {}
    names = [name for name, *_ in _BASES[goal.task.device, "bytes"] if goal.ceilings.get(name)]
    first = float(goal.floor["bytes"]) / (before / 1e3)
    base = min(names, key=lambda name: abs(first / goal.ceilings[name] - 1), default="")
    implied = first * before / floor
    return {base: implied} if base and implied > goal.ceilings[base] else {}


def floor_section(goal: Goal, tree: Tree) -> str:
    """How fast the task could be at best, and which side of the roofline it is on."""
    if not goal.floor_ms:
        return "The roofline floor of this task is not known."
    floor = known_floor(goal, tree)
    if not floor:
        return "The roofline floor of this task is not known: a kernel was faster than the ceilings measured here would allow."
    text = f"Roofline floor: **{floor:.4g} ms**"
    side = {"bytes": "memory traffic", "flops": "arithmetic"}.get(str(goal.floor.get("bound")))
    if side:
        moved, gflop = _bytes(int(goal.floor.get("bytes", 0))), float(goal.floor.get("flops", 0)) / 1e9
        text += f", bound by {side}: {moved} must move (every input and output once), {gflop:.4g} GFLOP must be done"
        text += _basis(goal, tree, floor)
    return f"{text}."


_BASES: dict[tuple[str, str], tuple[tuple[str, float, str], ...]] = {
    ("cuda", "bytes"): (("copy", 1.0, "the measured memory bandwidth"),),
    ("cuda", "flops"): (
        ("fp32", 1.0, "the measured rate of strict float32 products"),
        ("tf32", 1.0, "the measured TF32 rate"),
        ("fp16", 1.0, "the measured float16 rate of the tensor cores"),
        ("fp16", 1 / 3, "strict float32 on tensor cores from three float16 products: a third of the measured float16 rate"),
        ("fp32", 2.0, "twice the measured float32 rate, which float64 tensor cores reach at most"),
    ),
    ("cpu", "bytes"): (
        ("copy", 1.0, "the measured memory bandwidth"),
        ("cache", 1.0, "the measured bandwidth of data that stays in cache"),
    ),
    ("cpu", "flops"): (
        ("fp32", 1.0, "the measured rate of float32 products"),
        ("fp16", 1.0, "the measured rate of bfloat16 products"),
    ),
}
"""What a floor can rest on: a ceiling, the factor it is taken with, and words for it."""


def _basis(goal: Goal, tree: Tree, floor: float) -> str:
    """Which ceiling the floor rests on, read off its rate; nothing if it is none of them."""
    kind, ceilings = str(goal.floor["bound"]), {**goal.ceilings, **_later(goal, tree)}
    rate = float(goal.floor.get(kind, 0)) / (floor / 1e3)
    known = [(ceilings[n] * f, words) for n, f, words in _BASES[goal.task.device, kind] if ceilings.get(n)]
    off, words = min(((abs(rate / ceiling - 1), words) for ceiling, words in known), default=(1.0, ""))
    return f"; it rests on {words}" if off < 0.01 else ""


def start_section(goal: Goal, tree: Tree, seed: Candidate | None) -> str:
    """The kernel to start from; without one, accepted kernels of neighbouring signatures, if there are any."""
    if seed:
        return f"## Where to start\n{seed_section(goal, tree, seed)}\n\n"
    if not goal.neighbours:
        return ""
    shown = [f"`{_cell(name)}`:\n{fence(text, 'cpp')}" for name, text in goal.neighbours]
    words = "## Kernels of neighbouring signatures\nThey were accepted for other programs; shown for their techniques."
    return "\n\n".join([words, *shown, ""])


def seed_section(goal: Goal, tree: Tree, seed: Candidate) -> str:
    """A kernel to start from: its measurements, where it came from, and its source."""
    evaluation = seed.evaluation
    lines = ["The kernel to improve:", ""]
    if evaluation:
        lines += [f"- {line}" for line in measurements(evaluation, known_floor(goal, tree))]
    node = tree.ideas.get(seed.idea)
    if node:
        lines.append(f"- it implements: {_one_line(node.idea.mechanism)}")
    return "\n".join([*lines, "", fence(seed.text, "cpp")])


_RESOURCES = {"registers": "registers as compiled"}


def known_floor(goal: Goal, tree: Tree) -> float:
    """The floor that `floor_section` prints, milliseconds; 0 if it says that none is known."""
    return tree.floor_ms(goal.floor_ms) if goal.floor_ms else 0.0


def speed(evaluation: Evaluation) -> str:
    """How fast a timed candidate is, the ratio first: it is what counts, and milliseconds are those of that moment."""
    return f"{evaluation.speedup:.2f}x the best baseline ({evaluation.time_ms:.4g} ms then)"


def measurements(evaluation: Evaluation, floor_ms: float) -> list[str]:
    """What was measured of a candidate, one fact a line.

    Args:
        evaluation: The measurements.
        floor_ms: The roofline floor as the search knows it now, which may be lower than it was then; 0 if unknown.
    """
    lines = []
    if evaluation.time_ms:
        floor = f", {floor_ms / evaluation.time_ms:.0%} of the roofline floor's speed" if floor_ms else ""
        lines.append(f"{speed(evaluation)}, noise {evaluation.spread:.1%}{floor}")
        times = ", ".join(
            f"{name} {ms:.4g} ms ({ms / evaluation.time_ms:.2f}x this kernel's time)" for name, ms in evaluation.baselines_ms
        )
        lines.append(f"baselines beside it: {times}")
    if evaluation.constants:
        lines.append("tunables that won the sweep: " + ", ".join(f"{k}={v}" for k, v in evaluation.constants))
    resources = {f: v for f, v in vars(evaluation.resources).items() if v is not None and f not in ("kernels", "warnings")}
    if resources:
        named = {_RESOURCES.get(k, k.replace("_", " ")): f"{v:.0%}" if k == "occupancy" else v for k, v in resources.items()}
        shown = ", ".join(f"{name} {value}" for name, value in named.items())
        lines.append(f"compiler and driver: {shown}")
    lines += [f"kernel `{k.name}`: {_kernel_resources(k)}" for k in evaluation.resources.kernels]
    lines += [f"compiler warning: {_one_line(text)}" for text in evaluation.resources.warnings]
    lines += [f"profiler: {_one_line(text)}" for text in evaluation.counters]
    if evaluation.errors:
        worst = max(evaluation.errors, key=lambda e: e.frobenius / (e.frobenius_yardstick or 1.0))
        lines.append(f"largest error against float64: {worst.frobenius:.2e} (Frobenius, `{worst.output}`, {worst.distribution} "
                     f"inputs); eager's own: {worst.frobenius_yardstick:.2e}")  # fmt: skip
    if evaluation.detail:
        lines.append(f"note: {_one_line(_clip(evaluation.detail, 1500))}")
    return lines


def _kernel_resources(kernel: KernelResources) -> str:
    parts = [f"{kernel.registers} registers", f"spilled {kernel.spill_bytes} bytes", f"stack {kernel.local_bytes} bytes",
             f"static shared memory {kernel.static_smem_bytes} bytes"]  # fmt: skip
    if kernel.dynamic_smem_bytes is not None:
        parts.append(f"dynamic {kernel.dynamic_smem_bytes} bytes")
    return ", ".join(parts + ([f"occupancy {kernel.occupancy:.0%}"] if kernel.occupancy is not None else ["not launched"]))


_RANKING = (
    "Kernels are ranked by the ratio to the best baseline timed beside them: the machine's speed drifts, so milliseconds of "
    "different evaluations do not compare."
)


def history_section(tree: Tree, number: int) -> str:
    """Every idea tried before round `number` with what became of it, in order."""
    earlier = [node for node in tree.ideas.values() if node.round < number]
    rows = [(node, *outcome(tree, node)) for node in sorted(earlier, key=lambda n: place(n.slot))]
    rows = [row for row in rows if row[1]]
    if not rows:
        return "Nothing has been tried yet."
    if len(rows) > MAX_HISTORY:
        best = sorted(rows[: -MAX_HISTORY // 2], key=lambda row: row[2] or 0.0, reverse=True)[: MAX_HISTORY // 2]
        rows = [row for row in rows if row in best or row in rows[-MAX_HISTORY // 2 :]]
    lines = ["| round | family | idea | outcome |", "|---|---|---|---|"]
    lines += [f"| {n.round} | {n.idea.family} | {_cell(n.idea.mechanism, None)} | {_cell(words)} |" for n, words, _ in rows]
    best = tree.best(number - 1)
    if best is not None and best.evaluation is not None:
        lines += ["", f"Best so far: {speed(best.evaluation)}.", _RANKING]
    return "\n".join(lines)


def outcome(tree: Tree, node: IdeaNode) -> tuple[str, float | None]:
    """What became of an idea, in words, and its best speedup over the best baseline."""
    made = [c for c in tree.candidates.values() if c.idea == node.id and c.evaluation]
    made.sort(key=lambda c: (c.relative_time, place(c.slot)))
    if not made:
        return "", None
    best = made[0]
    seed = tree.candidates.get(node.seed)
    if best.evaluation is not None and best.time_ms < float("inf"):
        against = f", {seed.relative_time / best.relative_time:.2f}x its seed" if seed and seed.time_ms < float("inf") else ""
        return f"{speed(best.evaluation)}{against}", best.evaluation.speedup
    last = max(made, key=lambda c: place(c.slot)).evaluation
    return f"never correct ({len(made)} tries); last: {last.status}: {_one_line(last.detail)[:240]}", None


def idea_section(node: IdeaNode) -> str:
    """An idea as data."""
    return fence(f"family: {node.idea.family}\nmechanism: {node.idea.mechanism}\nexpected: {node.idea.expected}")


def _variation(variant: int, variants: int) -> str:
    if variants == 1:
        return ""
    return (
        f"This is implementation {variant + 1} of {variants} of the same idea, each written without sight of the others. Make "
        f"your own choices where the idea leaves them open (decomposition of the work, tile shapes, which unit does what); "
        + (
            "here, prefer the most direct form of the idea."
            if variant == 0
            else "here, prefer a less obvious but promising form of it."
        )
    )


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def _clip(text: str, limit: int = MAX_DETAIL) -> str:
    """The first and the last part of a long text."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}\n... ({len(text) - limit} characters left out) ...\n{text[-limit // 3 :]}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str, limit: int | None = 400) -> str:
    return _one_line(text).replace("|", "\\|").replace("`", "'")[:limit]
