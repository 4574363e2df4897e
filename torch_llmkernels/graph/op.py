"""The runtime operator `llmk::region`, and the slot that a compiled graph calls instead of a region.

A spec is everything a swapped region needs, as one string: its task, its kernel's source and constants. So a graph that torch
loads from its compile cache in a fresh process, or on a machine without a compiler, still runs: `bind(spec)` builds the kernel,
and where that fails the region runs its own program as the reference, with a logged reason. Generated code also names the sizes
of the workspaces that it allocates (`bind(spec, scratch)`): those may depend on the device, and the code may have been generated
on another one.
"""

from __future__ import annotations

import base64
import contextlib
import contextvars
import dataclasses
import functools
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.utils._sympy.functions import Max, Min

from torch_llmkernels import settings as settings_module
from torch_llmkernels.errors import LaunchError, LLMKernelsError, NotApplicable, ToolchainMissing
from torch_llmkernels.evaluation import Record
from torch_llmkernels.program import module_of
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task, TensorSpec, canonical_json, evaluate_dim

if TYPE_CHECKING:
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.launch import Workspace
    from torch_llmkernels.kernels.source import Kernel

log = logging.getLogger("torch_llmkernels.graph.op")
_profiler = torch.autograd.profiler  # its flag is read at every call


@dataclasses.dataclass(frozen=True)
class Spec:
    """The decoded form of a region operator's first argument.

    Attributes:
        task: What the region computes.
        kernel_name: File stem of the kernel, for people.
        kernel_text: The whole kernel file.
        constants: Chosen tunables.
    """

    task: Task
    kernel_name: str
    kernel_text: str
    constants: tuple[tuple[str, int], ...]

    @functools.cached_property
    def module(self) -> torch.fx.GraphModule:
        """The task's program, runnable: what the region runs where its kernel cannot."""
        return module_of(self.task)

    @functools.cached_property
    def prepared(self) -> tuple[str, ...]:
        """The workspaces that arrive behind the task's inputs, written once by `llmk::prepare` (see `Kernel.prepared`)."""
        from torch_llmkernels.kernels.source import parse_kernel

        try:
            return parse_kernel(self.kernel_text, self.kernel_name).prepared(self.task)
        except LLMKernelsError:
            return ()  # the build fails for the same reason, and says so

    @property
    def label(self) -> str:
        """How messages name the region: `layer_norm [key] by kernel_name`."""
        return f"{self.task.signature} [{self.task.key}] by {self.kernel_name}"


def encode_spec(record: Record) -> str:
    """The spec of a record: base64 of compressed JSON, because C++ wrappers paste it into a string literal unescaped."""
    plain = {
        "task": record.task.to_json(), "kernel_name": record.kernel_name, "kernel_text": record.kernel_text,
        "constants": dict(record.constants),
    }  # fmt: skip
    return base64.urlsafe_b64encode(zlib.compress(canonical_json(plain).encode(), 9)).decode()


@functools.lru_cache(maxsize=1024)
def decode_spec(spec: str) -> Spec:
    """The inverse of `encode_spec`.

    Raises:
        SchemaError: for a task of another schema version.
    """
    plain = json.loads(zlib.decompress(base64.urlsafe_b64decode(spec)))
    task = Task.from_json(plain["task"])
    return Spec(task, plain["kernel_name"], plain["kernel_text"], tuple(sorted(plain["constants"].items())))


def concrete_layout(task: Task, tensor: TensorSpec, symbols: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Shape and stride of a tensor of the task; `symbols` are values in the task's order: ints, SymInts or sympy expressions."""
    values = dict(zip((name for name, _ in task.symbols), symbols, strict=True))
    hints = dict(task.symbols)

    def dim(size: int | str) -> Any:
        if isinstance(size, int):
            return size
        evaluate_dim(size, hints)  # refuses everything but arithmetic over the task's symbols
        return eval(size, {"__builtins__": {}, "min": _smallest, "max": _largest}, values)

    return [dim(size) for size in tensor.shape], [dim(size) for size in tensor.stride]


def _largest(*values: Any) -> Any:
    """`max` of ints, SymInts or sympy expressions: Python's own would compare, which installs a guard."""
    if any(isinstance(v, sympy.Expr) for v in values):
        return Max(*values)
    return functools.reduce(torch.sym_max, values)


def _smallest(*values: Any) -> Any:
    """`min`, likewise."""
    if any(isinstance(v, sympy.Expr) for v in values):
        return Min(*values)
    return functools.reduce(torch.sym_min, values)


class Slot:
    """One region of the process: what every compiled graph that holds it calls.

    `fn` may be rebound at any time; the next call of every graph runs the new function, without a recompile (a CUDA graph
    keeps what it recorded). Signature of the call: `slot(*outputs, *workspaces, *inputs, *symbols)`, tensors then ints.

    Attributes:
        spec: What it was bound from.
        fn: The function that runs: at first one that builds the kernel, then its launcher.
        reason: Why the region runs its reference; empty while it runs its kernel.
    """

    __slots__ = ("_launchers", "_layouts", "_lock", "_range", "_scratch", "_settings", "_warned", "fn", "reason", "spec")

    def __init__(self, spec: Spec, settings: Settings, scratch: tuple[int, ...] | None = None) -> None:
        self.spec = spec
        self._scratch = scratch
        self.fn: Callable[..., None] = self._first_call
        self.reason = ""
        self._settings = settings
        self._launchers: dict[int, Callable[..., None]] = {}
        self._layouts: dict[torch.device, tuple[Workspace, ...]] = {}
        self._lock = threading.Lock()
        self._range = f"llmkernels::{spec.task.signature}"
        self._warned: set[str] = set()

    def __call__(self, *args: Any) -> None:
        try:
            if _profiler._is_profiler_enabled:
                with torch.profiler.record_function(self._range):
                    self.fn(*args)
            else:
                self.fn(*args)
        except (NotApplicable, LaunchError) as error:
            if self._settings.strict and isinstance(error, LaunchError):
                raise
            self._warn(f"runs its reference for some tensors: {error}")
            self.run_reference(*args)

    def workspaces(self, device: torch.device, prepared: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """The workspaces for one call in order, uninitialised but for those in `prepared`; none if it cannot be built here."""
        if device not in self._layouts:
            self._layouts[device] = workspace_layouts(self.spec, device)
        return merged(self.spec, self._layouts[device], prepared, functools.partial(_empty, device=device))

    def prepare(self, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the prepare launches write, given the task's constant inputs: `Spec.prepared`, in new memory.

        Raises:
            NotApplicable: for constants that the kernel cannot serve.
        """
        task, device = self.spec.task, constants[0].device
        layouts = workspace_layouts(self.spec, device)
        made = dict(zip((w.name for w in layouts), merged(self.spec, layouts, (), functools.partial(_empty, device=device)),
                        strict=True))  # fmt: skip
        given = dict(zip(task.constant, constants, strict=True))
        stand_in = constants[0]  # what the prepare launches do not read needs a valid address all the same
        tensors = [stand_in] * len(task.outputs) + list(made.values()) + [given.get(t.name, stand_in) for t in task.inputs]
        launcher = self._launcher(device)
        if hasattr(launcher, "prepare"):  # the reference needs nothing prepared
            launcher.prepare(*tensors, *(hint for _, hint in task.symbols))
        return [made[name] for name in self.spec.prepared]

    def run_reference(self, *args: Any) -> None:
        """Compute the outputs with the region's own program."""
        outputs, inputs, symbols = self._sorted(args)
        with torch.no_grad():
            aligned = [_aligned(tensor) for tensor in inputs]
            for output, value in zip(outputs, self.spec.module(*aligned, *symbols), strict=True):
                output.copy_(value)

    def _sorted(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Outputs, inputs and symbols of a call; its workspaces are left out."""
        task = self.spec.task
        first_symbol = len(args) - len(task.symbols)
        first_input = first_symbol - len(task.inputs)
        return args[: len(task.outputs)], args[first_input:first_symbol], args[first_symbol:]

    def _first_call(self, *args: Any) -> None:
        """Build for the device of the first output, then run; later calls skip the look-up where one device is all there is.

        Kernels do not look at strides, they are compiled for the task's: a graph that passes others is found out here, once.
        """
        self._check_layout(args)
        device = args[0].device
        launcher = self._launcher(device)
        self.fn = launcher if device.type == "cpu" or torch.cuda.device_count() == 1 else self._by_device
        launcher(*args)

    def _check_layout(self, args: tuple[Any, ...]) -> None:
        """Refuse tensors of another shape or other strides than the task's.

        Raises:
            NotApplicable: naming the tensor.
        """
        task = self.spec.task
        outputs, inputs, symbols = self._sorted(args)
        for tensor, given in zip((*task.outputs, *task.inputs), (*outputs, *inputs), strict=True):
            shape, stride = concrete_layout(task, tensor, symbols)
            steps = [have == want or size == 1 for size, have, want in zip(shape, given.stride(), stride, strict=True)]
            if list(given.shape) != shape or (given.numel() and not all(steps)):
                raise NotApplicable(
                    f"{tensor.name} has shape {tuple(given.shape)} and strides {given.stride()}, the kernel was compiled for "
                    f"shape {tuple(shape)} and strides {tuple(stride)}"
                )

    def _by_device(self, *args: Any) -> None:
        index = args[0].device.index
        (self._launchers.get(index) or self._launcher(args[0].device))(*args)

    def _launcher(self, device: torch.device) -> Callable[..., None]:
        index = device.index or 0
        with self._lock:
            if index not in self._launchers:
                self._launchers[index] = self._build(device.type, index)
            return self._launchers[index]

    def _build(self, device_type: str, index: int) -> Callable[..., None]:
        """The kernel's launcher, or the reference if it cannot be built here."""
        try:
            if device_type != self.spec.task.device:
                raise NotApplicable(f"made for {self.spec.task.device}, called with tensors on {device_type}")
            self._check_scratch(torch.device(device_type, index))
            with settings_module.using(self._settings):
                return build_launcher(self.spec, self._settings, index)
        except LLMKernelsError as error:
            if self._settings.strict:
                raise
            self._warn(f"runs its reference: {error}")
            self.reason = str(error)
            return self.run_reference

    def _check_scratch(self, device: torch.device) -> None:
        """Refuse workspaces that generated code allocates and that are smaller than what the kernel writes here.

        Checked once, when the kernel is built: the sizes are constants of the generated code.
        """
        needed = scratch_bytes(workspace_layouts(self.spec, device))
        given = needed if self._scratch is None else self._scratch
        if len(given) != len(needed) or any(has < needs for has, needs in zip(given, needed, strict=True)):
            raise NotApplicable(
                f"its graph was compiled where the kernel needs workspaces of {list(given)} bytes, here it needs {list(needed)}; "
                "compile the model on this device"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("region %s %s", self.spec.label, message)


_ALIGNMENT = 16


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or on CUDA a copy where it is not aligned to `_ALIGNMENT` bytes, as Inductor makes of its own inputs.

    Torch's attention kernels read such addresses without a check: the results are wrong, or the context is lost.
    """
    if tensor.device.type != "cuda" or tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    from torch._inductor.utils import clone_preserve_strides

    return clone_preserve_strides(tensor)


_slots: dict[tuple[str, tuple[int, ...] | None], Slot] = {}
_slots_lock = threading.Lock()
_settings: dict[str, Settings] = {}
_recorder: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("llmkernels_bound", default=None)


def set_settings(spec: str, settings: Settings) -> None:
    """The knobs (store, compiler, strictness) of the compilation that swaps a spec in, for slots that are bound from now on."""
    _settings[spec] = settings


def bind(spec: str, scratch: tuple[int, ...] | None = None) -> Slot:
    """The slot of a spec, one per process and `scratch`. Generated code calls this when it is loaded.

    The kernel is built at the first call.

    Args:
        spec: From `encode_spec`.
        scratch: Bytes of each workspace that the caller passes; None: it asks `Slot.workspaces` for them.
    """
    bound = _recorder.get()
    if bound is not None:
        bound.add(spec)
    slot = _slots.get((spec, scratch))
    if slot is None:
        with _slots_lock:
            settings = _settings.get(spec) or settings_module.current()
            slot = _slots.setdefault((spec, scratch), Slot(decode_spec(spec), settings, scratch))
    return slot


@contextlib.contextmanager
def binding() -> Iterator[set[str]]:
    """The specs that are bound inside, by generated code that is loaded there: what a compiled graph really holds."""
    bound: set[str] = set()
    token = _recorder.set(bound)
    try:
        yield bound
    finally:
        _recorder.reset(token)


def why_reference(spec: str) -> str:
    """Why some slot of this spec runs its reference in this process; empty while all of them run their kernel."""
    return next((slot.reason for (bound, _), slot in list(_slots.items()) if bound == spec and slot.reason), "")


def _renew_locks() -> None:
    """A forked child has no thread that would release a lock that was held at the fork."""
    global _slots_lock
    _slots_lock = threading.Lock()
    for slot in _slots.values():
        slot._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def slots() -> list[Slot]:
    """Every slot of this process, in the order they were bound."""
    with _slots_lock:
        return list(_slots.values())


def build_launcher(spec: Spec, settings: Settings, index: int) -> Callable[..., None]:
    """The launcher of a spec on device `index`, its binary from the store if it is there.

    Raises:
        LLMKernelsError: if the kernel does not parse, compile or load here.
    """
    from torch_llmkernels.cache.store import open_store
    from torch_llmkernels.kernels.launch import has_dynamic_workspace
    from torch_llmkernels.kernels.source import parse_kernel
    from torch_llmkernels.kernels.targets import build, target_for

    kernel = parse_kernel(spec.kernel_text, spec.kernel_name)
    target, constants = target_for(spec.task.device), dict(spec.constants)
    if reason := target.unavailable():
        raise ToolchainMissing(reason)
    facts = target.facts(index)
    binary = build(kernel, spec.task, constants, target, facts, open_store(settings))
    launcher = target.load(binary, kernel, spec.task, constants, facts, index)
    launcher.prepared = bool(spec.prepared)
    return _allocating(launcher, kernel, spec, facts) if has_dynamic_workspace(kernel, spec.task) else launcher


def _allocating(launcher: Callable[..., None], kernel: Kernel, spec: Spec, facts: DeviceFacts) -> Callable[..., None]:
    """A launcher that makes its workspaces itself, for those whose sizes are known at the call only."""
    from torch_llmkernels.kernels.launch import workspaces

    names, outputs = [name for name, _ in spec.task.symbols], len(spec.task.outputs)

    @functools.lru_cache(maxsize=256)
    def layouts(values: tuple[int, ...]) -> tuple[Workspace, ...]:
        return workspaces(kernel, spec.task, dict(spec.constants), facts, dict(zip(names, values, strict=True)))

    def launch(*args: Any) -> None:
        scratch = [_empty(w, args[0].device) for w in layouts(args[len(args) - len(names) :])]
        launcher(*args[:outputs], *scratch, *args[outputs:])

    return launch


def workspace_layouts(spec: Spec, device: torch.device) -> tuple[Workspace, ...]:
    """The contiguous scratch tensors that the kernel needs from its caller on this device; none if it cannot be used here.

    Those of a kernel with sizes that only a call knows are its own (`build_launcher`): Inductor plans none.
    """
    from torch_llmkernels.kernels.launch import workspaces
    from torch_llmkernels.kernels.source import parse_kernel
    from torch_llmkernels.kernels.targets import target_for

    try:
        kernel = parse_kernel(spec.kernel_text, spec.kernel_name)
        if not kernel.workspace:
            return ()
        return workspaces(kernel, spec.task, dict(spec.constants), target_for(device.type).facts(device.index))
    except LLMKernelsError:
        return ()  # the build fails for the same reason, and says so


def scratch_bytes(layouts: Sequence[Workspace]) -> tuple[int, ...]:
    """The size of each workspace, as generated code names it when it binds."""
    return tuple(layout.nbytes for layout in layouts)


def merged(spec: Spec, layouts: Sequence[Workspace], prepared: Sequence[Any], make: Callable[[Workspace], Any]) -> list[Any]:
    """Every workspace in order: those of `Spec.prepared` from `prepared` (if given), the others made."""
    kept = iter(prepared)
    return [next(kept) if prepared and w.name in spec.prepared else make(w) for w in layouts]


def _empty(layout: Workspace, device: torch.device) -> torch.Tensor:
    return torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device=device)


def _eager(spec: str, inputs: list[torch.Tensor], symbols: list[int]) -> list[torch.Tensor]:
    outputs = _empty_outputs(spec, inputs, symbols)
    _eager_out(spec, outputs, inputs, symbols)
    return outputs


def _eager_out(spec: str, outputs: list[torch.Tensor], inputs: list[torch.Tensor], symbols: list[int]) -> None:
    slot = bind(spec)
    count = len(slot.spec.task.inputs)
    slot(*outputs, *slot.workspaces(outputs[0].device, inputs[count:]), *inputs[:count], *symbols)


def _prepare(spec: str, constants: list[torch.Tensor]) -> list[torch.Tensor]:
    layouts = workspace_layouts(decode_spec(spec), constants[0].device)
    return bind(spec, scratch_bytes(layouts)).prepare(constants)  # the slot that code which is generated here binds


def _empty_prepared(spec: str, constants: list[torch.Tensor]) -> list[torch.Tensor]:
    decoded, device = decode_spec(spec), constants[0].device
    return [_empty(w, device) for w in workspace_layouts(decoded, device) if w.name in decoded.prepared]


def _empty_outputs(spec: str, inputs: list[torch.Tensor], symbols: Sequence[Any]) -> list[torch.Tensor]:
    """Uninitialised (or fake) outputs of the task's dtypes, shapes and strides, on the inputs' device."""
    task = decode_spec(spec).task
    layouts = [(concrete_layout(task, tensor, symbols), getattr(torch, tensor.dtype)) for tensor in task.outputs]
    return [torch.empty_strided(size, stride, dtype=dtype, device=inputs[0].device) for (size, stride), dtype in layouts]


def _define() -> torch.library.Library:
    library = torch.library.Library("llmk", "FRAGMENT")
    tags = [torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order]
    library.define("region(str spec, Tensor[] ins, SymInt[] syms) -> Tensor[]", tags=tags)
    library.define("region_out(str spec, Tensor(a!)[] outs, Tensor[] ins, SymInt[] syms) -> ()", tags=tags)
    library.define("prepare(str spec, Tensor[] constants) -> Tensor[]", tags=tags)
    library.impl("prepare", _prepare, "CompositeExplicitAutograd")
    torch.library.register_fake("llmk::prepare", _empty_prepared, lib=library)
    library.impl("region", _eager, "CompositeExplicitAutograd")
    library.impl("region_out", _eager_out, "CompositeExplicitAutograd")
    torch.library.register_fake("llmk::region", _empty_outputs, lib=library)
    torch.library.register_fake("llmk::region_out", lambda spec, outs, ins, syms: None, lib=library)
    return library


_library = _define()  # keeps the registrations alive


def region_op() -> torch._ops.OpOverload:
    """`llmk::region(str spec, Tensor[] ins, SymInt[] syms) -> Tensor[]`: functional, new outputs."""
    return torch.ops.llmk.region.default


def prepare_op() -> torch._ops.OpOverload:
    """`llmk::prepare(str spec, Tensor[] constants) -> Tensor[]`: the prepare launches of a kernel, workspaces of their own.

    It reads nothing but constants of the graph, so that Inductor's freezing runs it at compile time and keeps its result as a
    constant of its own; wherever it is not folded, it runs at every call.
    """
    return torch.ops.llmk.prepare.default


def region_out_op() -> torch._ops.OpOverload:
    """`llmk::region_out(str spec, Tensor(a!)[] outs, Tensor[] ins, SymInt[] syms) -> ()`: what C++ wrappers call."""
    return torch.ops.llmk.region_out.default
