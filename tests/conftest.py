"""Tests see neither the settings nor the store of whoever runs them."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_STORE = "LLMKERNELS_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """An empty store of this run's own (of each worker's, under xdist), and no knob from outside."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:  # what the main process has set up is inherited
        os.environ[_STORE] = os.path.join(os.environ[_STORE], worker)
        return
    for name in [name for name in os.environ if name.startswith("LLMKERNELS_") and not name.startswith("LLMKERNELS_TEST_")]:
        del os.environ[name]
    os.environ[_STORE] = tempfile.mkdtemp(prefix="llmkernels-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the store."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ[_STORE], ignore_errors=True)
