"""The outcome of checking and timing one candidate, the record of an accepted one, and what was decided with them.

An `Evaluation` cannot lie by omission: a status implies the fields that must be there, and building one without them raises.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.task import Task

SCHEMA = 1


class Status(enum.StrEnum):
    """How an evaluation ended, in the order of the pipeline."""

    INVALID = "invalid"  # the file breaks the kernel format
    NOT_APPLICABLE = "not_applicable"  # `implements`, dtypes or `where` exclude this task
    COMPILE_ERROR = "compile_error"
    LAUNCH_ERROR = "launch_error"
    CRASHED = "crashed"  # the worker died
    TIMEOUT = "timeout"
    FAILED = "failed"  # the machine, not the kernel: no memory or disk space was left, or nobody knows why
    WRONG = "wrong"  # values, shapes, aliasing, determinism, guard bands
    CORRECT = "correct"  # passed the check, not timed
    TIMED = "timed"  # passed the check, timed beside the baselines, passed the check again

    @property
    def is_correct(self) -> bool:
        return self in (Status.CORRECT, Status.TIMED)


@dataclasses.dataclass(frozen=True)
class ErrorStat:
    """Errors of one output under one input distribution, against the float64 reference, aggregated over seeds.

    Attributes:
        output: Name of the output.
        distribution: Name of the input distribution.
        frobenius: Relative Frobenius error of the candidate.
        frobenius_yardstick: The same of the native eager program.
        p999, p999_yardstick: 99.9th percentile of the error scaled by the problem's condition.
        maximum, maximum_yardstick: Largest scaled error.
        passed: Whether every bound held.
    """

    output: str
    distribution: str
    frobenius: float
    frobenius_yardstick: float
    p999: float
    p999_yardstick: float
    maximum: float
    maximum_yardstick: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """What the compiler and the driver report of one `__global__` function; None where the driver was not asked.

    Attributes:
        name: Of the function.
        registers: Per thread.
        local_bytes: Stack frame per thread, in local memory.
        spill_bytes: Stored to and loaded from local memory because registers ran out.
        static_smem_bytes: Static shared memory per block.
        dynamic_smem_bytes: Dynamic shared memory per block, the largest of its launches.
        occupancy: Resident warps over the device's maximum, 0 to 1, the smallest of its launches.
    """

    name: str
    registers: int
    local_bytes: int = 0
    spill_bytes: int = 0
    static_smem_bytes: int = 0
    dynamic_smem_bytes: int | None = None
    occupancy: float | None = None


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiler and the driver report; None where the target has no such number.

    Attributes:
        registers: Per thread, the largest over the file's launches.
        spill_bytes: Local memory per thread.
        static_smem_bytes: Static shared memory per block.
        dynamic_smem_bytes: Dynamic shared memory per block.
        occupancy: Resident warps over the device's maximum, 0 to 1.
        binary_bytes: Size of the cubin or shared object.
        kernels: The same for each `__global__` function of the file; empty for other targets and in records without it.
        warnings: What the compiler warned of, one line each.
    """

    registers: int | None = None
    spill_bytes: int | None = None
    static_smem_bytes: int | None = None
    dynamic_smem_bytes: int | None = None
    occupancy: float | None = None
    binary_bytes: int | None = None
    kernels: tuple[KernelResources, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Resources:
        """The resources that `dataclasses.asdict` wrote.

        Raises:
            TypeError, ValueError: for unknown fields.
        """
        kernels = tuple(KernelResources(**k) for k in plain.get("kernels", ()))
        return cls(**{**plain, "kernels": kernels, "warnings": tuple(plain.get("warnings", ()))})


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One candidate on one task on one device.

    Attributes:
        status: See `Status`.
        detail: One paragraph for a person and for the model that repairs: what failed, where, by how much; else empty.
        constants: The tunables that were used.
        errors: One entry per output and distribution; present from WRONG (by values) on.
        time_ms: Median milliseconds per call; TIMED only.
        spread: Share of the speedup by which its lower quartile over the turns lies below its median; TIMED only.
        baselines_ms: Median milliseconds of `eager`, `inductor` (and others) interleaved with the kernel; TIMED only.
        ratios: Each baseline's time over the kernel's, median over the turns in which both ran; empty in records without it.
        floor_ms: The roofline floor on this device; 0 if unknown.
        resources: What the compiler reports.
        counters: What the profiler counted, a line per launch, or a line that says why it did not; empty if it was not asked.
        tier: `quick` or `full`.
        environment: Versions, device name and flags the numbers hold for.
        seconds: What the evaluation itself took.
    """

    status: Status
    detail: str = ""
    constants: tuple[tuple[str, int], ...] = ()
    errors: tuple[ErrorStat, ...] = ()
    time_ms: float | None = None
    spread: float | None = None
    baselines_ms: tuple[tuple[str, float], ...] = ()
    ratios: tuple[tuple[str, float], ...] = ()
    floor_ms: float = 0.0
    resources: Resources = Resources()
    counters: tuple[str, ...] = ()
    tier: str = "quick"
    environment: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        timed = self.status is Status.TIMED
        if timed != (self.time_ms is not None) or timed != bool(self.baselines_ms) or timed != (self.spread is not None):
            raise ValueError(f"a {self.status} evaluation has times exactly if it was timed: {self}")
        if self.status.is_correct and not (self.errors and all(e.passed for e in self.errors)):
            raise ValueError(f"a {self.status} evaluation needs the errors that show it")
        if not self.status.is_correct and not self.detail:
            raise ValueError(f"a {self.status} evaluation needs a detail")

    @property
    def baseline_ms(self) -> float | None:
        """The best baseline's time, or None if nothing was timed."""
        return min((ms for _, ms in self.baselines_ms), default=None)

    @property
    def speedup(self) -> float | None:
        """Best baseline's time over the kernel's, turn by turn where that was kept; None if nothing was timed."""
        paired = min((ratio for _, ratio in self.ratios), default=None)
        return paired or (self.baseline_ms / self.time_ms if self.time_ms and self.baseline_ms else None)

    @property
    def relative_time(self) -> float:
        """What candidates are ranked by: the kernel's time over the best baseline's beside it; infinite if nothing was timed.

        Milliseconds of two evaluations do not compare on a machine whose speed drifts (other users, clocks): the ratio does.
        """
        return 1.0 / self.speedup if self.speedup else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = dataclasses.asdict(self)
        plain["status"] = str(self.status)
        for name in ("constants", "baselines_ms", "ratios", "environment"):
            plain[name] = dict(plain[name])
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Evaluation:
        """The evaluation `to_json` wrote.

        Raises:
            SchemaError: if fields are missing or contradict each other.
        """
        try:
            values = dict(plain)
            values["status"] = Status(values["status"])
            values["errors"] = tuple(ErrorStat(**e) for e in values["errors"])
            values["resources"] = Resources.from_json(values["resources"])
            values["counters"] = tuple(values.get("counters", ()))
            values.setdefault("ratios", {})  # not in records of earlier releases
            for name in ("constants", "baselines_ms", "ratios", "environment"):
                values[name] = tuple(values[name].items())
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(f"evaluation is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Record:
    """An accepted kernel bound to an exact task on a kind of device.

    Attributes:
        task: What it computes.
        kernel_name: File stem of the kernel, for people.
        kernel_text: The whole kernel file.
        constants: Chosen tunables.
        device_kind: Slug of the device's kind, such as `nvidia-h100` or `cpu-x86_64-avx512`.
        evaluation: The evidence.
        origin: Where the kernel came from: `library`, `library, <where it had it from>`, `search:<run>`, `import:<bundle>`.
    """

    task: Task
    kernel_name: str
    kernel_text: str
    constants: tuple[tuple[str, int], ...]
    device_kind: str
    evaluation: Evaluation
    origin: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return {
            "schema": SCHEMA,
            "task": self.task.to_json(),
            "kernel_name": self.kernel_name,
            "kernel_text": self.kernel_text,
            "constants": dict(self.constants),
            "device_kind": self.device_kind,
            "evaluation": self.evaluation.to_json(),
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Record:
        """The record `to_json` wrote.

        Raises:
            SchemaError: for another schema version or missing fields.
        """
        if plain.get("schema") != SCHEMA:
            raise SchemaError(f"record schema {plain.get('schema')!r}, this release reads {SCHEMA}; verify again")
        try:
            return cls(
                Task.from_json(plain["task"]), plain["kernel_name"], plain["kernel_text"],
                tuple(sorted(plain["constants"].items())), plain["device_kind"], Evaluation.from_json(plain["evaluation"]),
                plain["origin"],
            )  # fmt: skip
        except KeyError as error:
            raise SchemaError(f"record is damaged: no field {error}") from error


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the backend does with one task on this device, and why.

    Attributes:
        record: The kernel to swap in, or None to keep Inductor.
        reason: One line: `swapped: 1.84x the best baseline`, `kept Inductor: no kernel implements rms_norm on cpu`, ...
        tried: Every kernel that was considered: its name and its evaluation; several of one that timed out or crashed repeatedly.
    """

    record: Record | None
    reason: str
    tried: tuple[tuple[str, Evaluation], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return {
            "schema": SCHEMA,
            "record": self.record and self.record.to_json(),
            "reason": self.reason,
            "tried": [[name, evaluation.to_json()] for name, evaluation in self.tried],
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Decision:
        """The decision `to_json` wrote.

        Raises:
            SchemaError: for another schema version or missing fields.
        """
        if plain.get("schema") != SCHEMA:
            raise SchemaError(f"decision schema {plain.get('schema')!r}, this release reads {SCHEMA}")
        record = plain["record"] and Record.from_json(plain["record"])
        return cls(record, plain["reason"], tuple((n, Evaluation.from_json(e)) for n, e in plain["tried"]))


@dataclasses.dataclass(frozen=True)
class GraphDecision:
    """What the measurement of a model says about one of its graphs.

    Attributes:
        graph: `graph_decision.graph_key` of the graph.
        swapped: Tasks whose kernels stay in, by key, each with the digest of the kernel that was measured.
        vetoed: The same for those that stay out.
        inductor_ms: Milliseconds of the model compiled by Inductor.
        swapped_ms: The same with the swaps that stay in; if none does, with those that were compared with Inductor.
        noise: The relative error of their ratio (two standard errors).
        device_kind: Slug of the kind of the device that was measured; filled in when it is stored, like the next two.
        unit: Which device of that kind.
        driver: Version of its driver.
    """

    graph: str
    swapped: tuple[tuple[str, str], ...]
    vetoed: tuple[tuple[str, str], ...]
    inductor_ms: float
    swapped_ms: float
    noise: float
    device_kind: str = ""
    unit: str = ""
    driver: str = ""

    @property
    def speedup(self) -> float:
        """Inductor's time over the time with swaps, for the whole model; 1 if no swap is left."""
        return self.inductor_ms / self.swapped_ms if self.swapped and self.swapped_ms else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = dataclasses.asdict(self)
        return {**plain, "schema": SCHEMA, "swapped": dict(self.swapped), "vetoed": dict(self.vetoed)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> GraphDecision:
        """The decision `to_json` wrote.

        Raises:
            SchemaError: for another schema version or missing fields.
        """
        if plain.get("schema") != SCHEMA:
            raise SchemaError(f"graph decision schema {plain.get('schema')!r}, this release reads {SCHEMA}; precompile again")
        try:
            pairs = {name: tuple(sorted(plain[name].items())) for name in ("swapped", "vetoed")}
            return cls(
                plain["graph"], pairs["swapped"], pairs["vetoed"], plain["inductor_ms"], plain["swapped_ms"], plain["noise"],
                plain["device_kind"], plain["unit"], plain["driver"],
            )  # fmt: skip
        except (KeyError, AttributeError) as error:
            raise SchemaError(f"graph decision is damaged: {error!r}; precompile again") from error
