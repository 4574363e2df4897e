"""Tests see neither the settings nor the store of whoever runs them. `--results FILE` keeps their outcomes for others to read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

_STORE = "LLMKERNELS_CACHE_DIR"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--results FILE`: as JSON, with device, versions and commit."""
    parser.addoption("--results", metavar="FILE", help="write every outcome, with device, versions and commit, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """An empty store of this run's own (of each worker's, under xdist), and no knob from outside."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:  # what the main process has set up is inherited
        os.environ[_STORE] = os.path.join(os.environ[_STORE], worker)
        return
    for name in [name for name in os.environ if name.startswith("LLMKERNELS_") and not name.startswith("LLMKERNELS_TEST_")]:
        del os.environ[name]
    os.environ[_STORE] = tempfile.mkdtemp(prefix="llmkernels-tests-")
    if config.getoption("results"):
        config.pluginmanager.register(Outcomes(Path(config.getoption("results"))))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the store."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ[_STORE], ignore_errors=True)


class Outcomes:
    """Collects what `--results` writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.begin = path, time.monotonic()
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The call's outcome, or that of a setup or a teardown that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = str(report.outcome)

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        import benchmark_path  # noqa: F401 (makes `common` importable)
        import common
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        written = {
            "benchmark": "tests", **common.header(device, {}), "seconds": round(time.monotonic() - self.begin),
            "summary": counts, "rows": [{"test": name, "outcome": outcome} for name, outcome in sorted(self.outcomes.items())],
        }  # fmt: skip
        self.path.write_text(json.dumps(written, indent=1) + "\n")
