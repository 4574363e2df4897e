"""The error tree.

    LLMKernelsError
    ├── SettingsError            a knob with an unknown name or a value that does not parse
    ├── TaskError                a region that has no canonical encoding
    ├── KernelSourceError        a kernel file whose header or source breaks the format
    ├── ExpressionError          a launch expression outside the language, or one that overflows
    ├── NotApplicable            a kernel that does not serve this task or these tensors (`where`, dtype, alignment)
    ├── CompileError             the device or host compiler refused the source (`log` holds its words)
    ├── ToolchainMissing         no compiler or driver binding for the target
    ├── LaunchError              the driver refused a launch
    ├── StoreError               the persistent store cannot be used as it is
    │   └── SchemaError          a record, bundle or journal of another schema version
    ├── WorkerError              an evaluation worker failed
    │   ├── WorkerTimeout        it ran past its limit and was killed
    │   └── WorkerDied           it exited without an answer
    └── SearchError              a search cannot go on
        └── ProviderError        a language model endpoint gave no usable answer

Every message says what happened, where, and what to do next. All of them cross process boundaries by pickle.
"""

from __future__ import annotations


class LLMKernelsError(Exception):
    """Base of every error this package raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


def _rebuild(cls: type[LLMKernelsError], args: tuple[object, ...], state: dict[str, object]) -> LLMKernelsError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class SettingsError(LLMKernelsError, ValueError):
    """A knob with an unknown name or a value that does not parse."""


class TaskError(LLMKernelsError):
    """A region that has no canonical encoding; it stays with Inductor."""


class KernelSourceError(LLMKernelsError):
    """A kernel file whose header or source breaks the format."""


class ExpressionError(LLMKernelsError):
    """A launch expression outside the language, an unknown name, a division by zero or an overflow."""


class NotApplicable(LLMKernelsError):
    """A kernel that does not serve this task or these tensors; the region runs its reference."""


class CompileError(LLMKernelsError):
    """The compiler refused the source.

    Args:
        message: One line.
        log: The compiler's own output.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class ToolchainMissing(LLMKernelsError):
    """No compiler or driver binding for the target on this machine."""


class LaunchError(LLMKernelsError):
    """The driver refused a launch."""


class StoreError(LLMKernelsError):
    """The persistent store cannot be used as it is."""


class SchemaError(StoreError):
    """A record, bundle or journal of another schema version, or one that is damaged."""


class WorkerError(LLMKernelsError):
    """An evaluation worker failed."""


class WorkerTimeout(WorkerError):
    """The worker ran past its limit and was killed."""


class WorkerDied(WorkerError):
    """The worker exited without an answer.

    Attributes:
        terminated: Whether a signal ended it that asks a process to end, which comes from outside and not from a fault.
        killed: Whether SIGKILL did, which is how a system that is short of memory takes it back.
    """

    def __init__(self, message: str, terminated: bool = False, killed: bool = False) -> None:
        super().__init__(message)
        self.terminated, self.killed = terminated, killed


class SearchError(LLMKernelsError):
    """A search cannot go on."""


class ProviderError(SearchError):
    """A language model endpoint gave no usable answer."""
