"""What there is to evaluate, as a value that crosses process and machine boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.task import Task


@dataclasses.dataclass(frozen=True)
class Job:
    """One evaluation to do.

    Attributes:
        task: What the kernel should compute.
        kernel_text: The whole kernel file.
        kernel_name: File stem, for messages.
        constants: Tunables to use; None: choose among the kernel's own.
        tier: `quick` or `full`.
        timed: Whether to time it beside its baselines.
        seed: Of the data.
        device_index: Which device.
        binaries: Folder of compiled code, looked in before compiling and added to after; empty: none.
        brief: Whether timing may end as soon as every turn agrees, by far, on which is faster: enough to decide, too little to
            rank.
        profiled: Whether to read the device's counters of a kernel that is not far behind its baselines.
        listed: Whether the kernel must compile for every other dtype and signature that its header lists.
        limit_s: Seconds it may take, where `worker_timeout_s` allows more.
    """

    task: Task
    kernel_text: str
    kernel_name: str = "candidate"
    constants: Mapping[str, int] | None = None
    tier: str = "quick"
    timed: bool = True
    seed: int = 0
    device_index: int = 0
    brief: bool = False
    profiled: bool = False
    listed: bool = False
    binaries: str = ""
    limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.tier not in ("quick", "full"):
            raise ValueError(f"tier {self.tier!r} is not 'quick' or 'full'")

    def on(self, device_index: int) -> Job:
        """The same job on another device."""
        return dataclasses.replace(self, device_index=device_index)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "task": self.task.to_json(), "constants": None if self.constants is None else dict(self.constants)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Job:
        """The job `to_json` wrote.

        Raises:
            SchemaError: if fields are missing or unknown.
        """
        try:
            return cls(**{**plain, "task": Task.from_json(plain["task"])})
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(f"evaluation job is damaged: {error}") from error
