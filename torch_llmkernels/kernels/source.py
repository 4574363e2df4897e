"""A kernel file: parsed, checked, and asked whether it can serve a task.

`parse_kernel` is strict, because its messages are what a language model repairs a candidate from: each says which field or
line is wrong, why, and what would be right. Whether the code compiles and computes the right thing is for the targets and the
evaluation.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from typing import TYPE_CHECKING, Any

from torch_llmkernels import task as tasks
from torch_llmkernels.errors import ExpressionError, KernelSourceError, NotApplicable
from torch_llmkernels.kernels import csource, launch
from torch_llmkernels.kernels.csource import Function
from torch_llmkernels.kernels.expression import Expression
from torch_llmkernels.kernels.header import Header, Launch, parse_header, signatures_of

if TYPE_CHECKING:
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.task import Task

MAX_BYTES = 400_000
_PDL_WAITS = ("pdl_wait(", "griddepcontrol.wait")
_OPEN, _CLOSE = "/*---", "---*/"
_TENSOR_ATTRIBUTE = re.compile(r"(\w+)\.(?:(?:shape|stride)\[-?\d+\]|numel|ndim|itemsize|contiguous|channels_last)\Z")
_DEVICE = ("device.sms", "device.smem_per_block", "device.threads", "device.arch")


@dataclasses.dataclass(frozen=True)
class Kernel(Header):
    """A kernel file that follows the format.

    Attributes:
        name: File stem, for people.
        text: The whole file.
        body: The source after the header.
        first_line: The file's line on which the body starts.
        tensors: Inputs and outputs that it takes, in order of first use: every pointer argument that is no workspace.
    """

    name: str
    text: str
    body: str
    first_line: int
    tensors: tuple[str, ...]

    @property
    def digest(self) -> str:
        """20 hex digits of the file's text."""
        return tasks.digest(self.text)

    @property
    def label(self) -> str:
        """How decisions name the kernel: `name@digest`, so that an edited file counts as a new one."""
        return f"{self.name}@{self.digest[:8]}"

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Prepare launches, then main launches."""
        return (*self.prepare, *self.launch)

    def prepared(self, task: Task) -> tuple[str, ...]:
        """The workspaces that are written once and kept, because they are made of constants of the task alone; else none.

        The prepare launches then run once per compiled graph, elsewhere before the main launches of every call.
        """
        used = {arg for step in self.prepare for arg in step.args}
        read = used & {t.name for t in task.inputs}
        if not read or not read <= set(task.constant) or used & {t.name for t in task.outputs}:
            return ()  # a launch that writes an output is no packing: outputs do not exist yet where it would run
        if launch.is_dynamic(self, self.prepare, task) or launch.has_dynamic_workspace(self, task):
            return ()
        return tuple(w.name for w in self.workspace if w.name in used)

    def why_not(self, task: Task) -> str | None:
        """The reason why it cannot serve `task` whatever the constants, or None."""
        if not {task.signature, task.signature_key} & set(self.implements):
            return f"it implements {', '.join(self.implements)}, the task is {task.signature}"
        if self.target != task.device:
            return f"it is written for {self.target}, the task is on {task.device}"
        dtype = launch.main_dtype(task)
        if dtype not in self.dtypes:
            return f"it serves {', '.join(self.dtypes)}, the task's first floating input is {dtype}"
        return self._why_not_tensors(task) or launch.why_not(self, task)

    def _why_not_tensors(self, task: Task) -> str | None:
        names = [t.name for t in (*task.inputs, *task.outputs)]
        for name in self.tensors:
            if name not in names and name not in self.optional:
                return f"it needs the tensor {name}, which the task lacks (the task has {', '.join(names)})"
        for name in names:
            if name not in self.tensors:
                return f"the task has the tensor {name}, which no launch takes as an argument"
        return None

    def tunings(self, task: Task, facts: DeviceFacts) -> list[dict[str, int]]:
        """Every combination of tunables for which all `where` conditions hold on `task` (dynamic: at its hints) and device."""
        names = [name for name, _ in self.tune]
        found = []
        for values in itertools.product(*(choices for _, choices in self.tune)):
            constants = dict(zip(names, values, strict=True))
            try:
                launch.check_where(self, launch.environment(self, task, constants, facts))
            except (NotApplicable, ExpressionError):
                continue
            found.append(constants)
        return found


def parse_kernel(text: str, name: str = "candidate") -> Kernel:
    """Parse and check a kernel file.

    Args:
        text: The whole file: the header comment, then CUDA C or C++.
        name: File stem, for messages.

    Raises:
        KernelSourceError: if anything breaks the format; the message says what, where, and what to do.
    """
    try:
        return _parse(text, name)
    except KernelSourceError as error:
        raise KernelSourceError(f"{name}: {error}") from None


def implements(text: str) -> tuple[str, ...]:
    """The signatures that the header of a kernel file names; reads nothing else of the file.

    Raises:
        KernelSourceError: if there is no header, or none that says it.
    """
    return signatures_of(_split(text)[0])


@functools.lru_cache(maxsize=256)  # one compilation looks at the same files many times
def _parse(text: str, name: str) -> Kernel:
    if len(text.encode()) > MAX_BYTES:
        raise KernelSourceError(f"the file is larger than {MAX_BYTES} bytes")
    if "\0" in text:
        raise KernelSourceError("the file has a NUL character; it must be plain text")
    toml, body, first_line = _split(text)
    header = parse_header(toml)
    tokens = csource.tokenize(body, first_line)
    csource.check_tokens(body, tokens, header.target, first_line)
    _check_pdl(header, body)
    functions = csource.entry_functions(tokens, header.target)
    _check_entries(header, functions)
    header = dataclasses.replace(
        header,
        prepare=tuple(_bind(step, f"prepare[{i}]", functions) for i, step in enumerate(header.prepare)),
        launch=tuple(_bind(step, f"launch[{i}]", functions) for i, step in enumerate(header.launch)),
    )
    _check_used(header, functions)
    _check_unique(header)
    fields: dict[str, Any] = {f.name: getattr(header, f.name) for f in dataclasses.fields(Header)}
    kernel = Kernel(**fields, name=name, text=text, body=body, first_line=first_line, tensors=_tensors(header))
    _check_names(kernel)
    return kernel


def _split(text: str) -> tuple[str, str, int]:
    """(header TOML with leading newlines, body, the body's first line)."""
    start = len(text) - len(text.lstrip())
    if not text.startswith(_OPEN, start):
        raise KernelSourceError(f"the file must start with the header comment: {_OPEN} on the first line, TOML, then {_CLOSE}")
    end = text.find(_CLOSE, start)
    if end < 0:
        raise KernelSourceError(f"the header comment is not closed; end it with {_CLOSE}")
    before = text.count("\n", 0, start)
    after = text.count("\n", 0, end + len(_CLOSE))
    return "\n" * before + text[start + len(_OPEN) : end], text[end + len(_CLOSE) :], after + 1


def _check_entries(header: Header, functions: dict[str, Function]) -> None:
    if not header.launch:
        raise KernelSourceError("header: no [[launch]]; say which kernel to launch with which args")
    if header.target == "cpu" and len(header.launch) != 1:
        raise KernelSourceError(f"header: a CPU kernel is one function, so exactly one [[launch]], not {len(header.launch)}")
    if header.target == "cpu" and header.tensor_map:
        raise KernelSourceError("header: [[tensor_map]] is for cuda")
    for function in functions.values():
        if header.target == "cuda" and not function.is_global:
            raise KernelSourceError(
                f'line {function.line}: {function.name} is `extern "C"` but not `__global__`; make it one of them'
            )


def _check_pdl(header: Header, body: str) -> None:
    """A launch that overlaps its predecessor sees and spares that one's memory only behind a wait."""
    if any(step.pdl for step in (*header.prepare, *header.launch)) and not any(word in body for word in _PDL_WAITS):
        raise KernelSourceError(
            "header: pdl = true, but nothing waits: call pdl_wait() before the kernel reads or writes what an earlier launch uses"
        )


def _bind(step: Launch, where: str, functions: dict[str, Function]) -> Launch:
    """The launch with the parameters of its C definition."""
    if step.kernel not in functions:
        defined = ", ".join(functions) or "none"
        raise KernelSourceError(
            f"{where}: kernel '{step.kernel}' has no `extern \"C\"` definition in the source (defined: {defined})"
        )
    params = functions[step.kernel].params
    if len(params) != len(step.args):
        raise KernelSourceError(
            f"{where}: {step.kernel} takes {len(params)} parameters ({', '.join(p.name for p in params)}) "
            f"but args has {len(step.args)} ({', '.join(step.args)})"
        )
    return dataclasses.replace(step, params=params)


def _check_used(header: Header, functions: dict[str, Function]) -> None:
    launched = {step.kernel for step in (*header.prepare, *header.launch)}
    for function in functions.values():
        if function.name not in launched:
            raise KernelSourceError(f'line {function.line}: {function.name} is `extern "C"` but no launch uses it')


def _check_unique(header: Header) -> None:
    names = [n for n, _ in header.dims] + [n for n, _ in header.tune]
    names += [w.name for w in header.workspace] + [m.name for m in header.tensor_map]
    macros = [n for n, _ in header.tune] + [n.upper() for n in header.static]
    for name in (*names, *macros):
        if names.count(name) > 1 or macros.count(name) > 1:
            raise KernelSourceError(f"header: the name '{name}' is used twice among dims, static, tune, workspace and tensor_map")
    for name in header.static:
        if name not in dict(header.dims):
            raise KernelSourceError(f"header: static dim '{name}' is not defined in dims")


def _tensors(header: Header) -> tuple[str, ...]:
    """Names of the tensors passed by pointer or described by a tensor map; checks the kind of every non-scalar argument."""
    others = {n for n, _ in header.dims} | {n for n, _ in header.tune}
    workspaces, maps = {w.name for w in header.workspace}, {m.name for m in header.tensor_map}
    found: dict[str, None] = {}
    steps = [(f"prepare[{i}]", s) for i, s in enumerate(header.prepare)] + [
        (f"launch[{i}]", s) for i, s in enumerate(header.launch)
    ]
    for where, step in steps:
        for arg, param in zip(step.args, step.params, strict=True):
            what = f"{where}: argument '{arg}' of {step.kernel}"
            if param.type == "tensor_map" and arg not in maps:
                raise KernelSourceError(f"{what} must be the name of a [[tensor_map]] (there are: {', '.join(maps) or 'none'})")
            if param.type == "pointer":
                if not arg.isidentifier() or arg in others or arg in maps:
                    raise KernelSourceError(
                        f"{what} is passed to the pointer {param.name}; name a tensor of the task or a workspace"
                    )
                if arg not in workspaces:
                    found[arg] = None
    for spec in header.tensor_map:
        if spec.over not in workspaces:
            found[spec.over] = None
    return tuple(found)


def _check_names(kernel: Kernel) -> None:
    for name in kernel.optional:
        if name not in kernel.tensors:
            raise KernelSourceError(f"header: optional tensor '{name}' is not an argument of any launch; pass it or drop it")
    known = {name for name, _ in kernel.tune} | {f"HAS_{name.upper()}" for name in kernel.optional}
    known |= {launch.stage_macro(stage) for stage in launch.stages(kernel)}
    names = [name for name, _ in kernel.dims]
    for i, (name, expression) in enumerate(kernel.dims):
        late = sorted(expression.names & set(names[i:]))
        if late:
            raise KernelSourceError(
                f"dims.{name}: reads '{late[0]}', which is defined at or after it; dims are evaluated in order"
            )
        _check_expression(kernel, f"dims.{name}", expression, known)
        known.add(name)
    for where, expression in _expressions(kernel):
        _check_expression(kernel, where, expression, known)


def _expressions(kernel: Kernel) -> list[tuple[str, Expression]]:
    found = [(f"where[{i}]", e) for i, e in enumerate(kernel.where)]
    found += [(f"workspace {w.name}.shape", e) for w in kernel.workspace for e in w.shape]
    for spec in kernel.tensor_map:
        found += [(f"tensor_map {spec.name}", e) for e in (*spec.dims, *spec.strides, *spec.box, *spec.elem_strides)]
    for step in kernel.launches:
        found += [(f"launch {step.kernel}", e) for e in step.expressions]
        for arg, param in zip(step.args, step.params, strict=True):
            if param.type not in ("pointer", "tensor_map"):
                found.append((f"launch {step.kernel}: argument '{arg}'", _scalar(arg, step.kernel)))
    return found


def _scalar(arg: str, kernel: str) -> Expression:
    try:
        return Expression(arg)
    except ExpressionError as error:
        raise KernelSourceError(f"launch {kernel}: argument '{arg}' is passed by value: {error}") from None


def _check_expression(kernel: Kernel, where: str, expression: Expression, known: set[str]) -> None:
    """Refuse names that no task could define. A lower-case bare name may be a parameter of the task; that is for `why_not`."""
    passed_by_pointer = {*kernel.tensors, *(w.name for w in kernel.workspace), *(m.name for m in kernel.tensor_map)}
    for name in sorted(expression.names):
        tensor = _TENSOR_ATTRIBUTE.match(name)
        if name in known or name in _DEVICE or (tensor and tensor[1] in kernel.tensors):
            continue
        if re.fullmatch(r"\w+\.product", name) and name.partition(".")[0] not in passed_by_pointer:
            continue  # of a list parameter, such as normalized_shape.product; the task decides whether it is one
        if name in passed_by_pointer:
            problem = f"'{name}' is a tensor, workspace or tensor map, not a number"
        elif tensor:
            problem = f"'{tensor[1]}' is not a tensor of this kernel (its pointer arguments are: {', '.join(kernel.tensors)})"
        elif name.startswith("device."):
            problem = f"'{name}' is unknown (device has {', '.join(_DEVICE)})"
        elif "." in name:
            problem = f"'{name}': a tensor has .shape[i], .stride[i], .numel, .ndim, .itemsize, .contiguous and .channels_last"
        elif name.upper() == name and not name.startswith("_"):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problem = (
                f"'{name}' is neither a tunable, HAS_<an optional tensor> nor OP_<a stage that it implements> "
                f"(known: {', '.join(sorted(known))}){hint}"
            )
        else:
            continue
        raise KernelSourceError(f"{where}: in {expression.text!r}, {problem}")
