"""`torch.compile(model, backend="llmkernels")`: Inductor plus a verified library of kernels that language models wrote.

Nothing has to be imported to use the backend: torch finds it through its entry point. This module stays light, because torch
imports it while it reads `TORCH_LOGS=+torch_llmkernels`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "override", "precompile", "report"]

_LAZY = {
    "override": "torch_llmkernels.settings",
    "precompile": "torch_llmkernels.precompilation",
    "report": "torch_llmkernels.registry",
}


def __getattr__(name: str) -> Any:
    """Import a public function at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # also over the submodule of the same name, which the import has just bound
    return value


def __dir__() -> list[str]:
    return __all__
