"""The CUDA target: cubins from NVRTC (`nvrtc`), loaded and launched through the driver (`cuda_launcher`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch_llmkernels.errors import ExpressionError, NotApplicable, ToolchainMissing
from torch_llmkernels.kernels import launch, nvrtc
from torch_llmkernels.kernels.cuda_launcher import CudaLauncher
from torch_llmkernels.kernels.device import DeviceFacts, cuda_facts
from torch_llmkernels.kernels.targets import Binary
from torch_llmkernels.task import digest

if TYPE_CHECKING:
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task


class CudaTarget:
    """NVRTC and the driver API; see `targets.Target`."""

    name = "cuda"

    def unavailable(self) -> str | None:
        try:
            nvrtc.bindings()
            nvrtc.include_directory()
        except ToolchainMissing as error:
            return str(error)
        import torch

        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    def current(self) -> int:
        import torch

        return torch.cuda.current_device()

    def facts(self, index: int | None = None) -> DeviceFacts:
        return cuda_facts(self.current() if index is None else index)

    def binary_key(self, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> str:
        macros = _macros(kernel, task, constants, facts)
        return digest([kernel.digest, macros, digest(nvrtc.prelude()), nvrtc.FLAGS, nvrtc.version(), facts.arch])

    def compile(self, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> Binary:
        code, resources = nvrtc.compile_cubin(kernel, _macros(kernel, task, constants, facts), facts.arch)
        return Binary(code, resources, self.binary_key(kernel, task, constants, facts))

    def load(
        self,
        binary: Binary,
        kernel: Kernel,
        task: Task,
        constants: Mapping[str, int],
        facts: DeviceFacts,
        index: int | None = None,
    ) -> CudaLauncher:
        launcher = CudaLauncher(binary, kernel, task, constants, facts)
        launcher.load_on(self.current() if index is None else index)
        return launcher


CUDA = CudaTarget()


def _macros(kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> dict[str, str]:
    try:
        return launch.macros(kernel, task, constants, facts)
    except ExpressionError as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None
