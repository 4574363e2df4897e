"""`make wheel-test` runs this in an empty directory with the built wheel installed: does a user's installation swap a kernel?"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

EMPTY = Path.cwd()
assert not any(EMPTY.iterdir()), "run this from an empty directory: the wheel must need nothing else"
os.environ["LLMKERNELS_CACHE_DIR"] = tempfile.mkdtemp(prefix="llmkernels-wheel-")  # made with mode 0700

import torch  # noqa: E402 (the environment first)

assert "llmkernels" in torch._dynamo.list_backends(), "the backend's entry point is not installed"

import torch_llmkernels  # noqa: E402
from torch_llmkernels.cache.library import default_library  # noqa: E402
from torch_llmkernels.settings import current  # noqa: E402

package = Path(torch_llmkernels.__file__).parent
assert package.is_relative_to(sys.prefix), f"imported from {package}, not from the wheel in {sys.prefix}"
library = default_library(current())
assert library.root == package / "_library", library
assert library.signatures(), "the wheel has no kernels"


def check() -> None:
    """A layer norm with a kernel of the wheel's library in it equals the one without."""
    model, x = torch.nn.LayerNorm(256), torch.randn(64, 256)
    compiled = torch.compile(model, backend="llmkernels", options={"swap": "correct"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    swapped = [region for graph in torch_llmkernels.report() for region in graph.regions if region.swapped]
    assert swapped, torch_llmkernels.report()
    print(f"wheel: swapped {swapped[0].kernel} from {library.root}: {swapped[0].reason}")


if __name__ == "__main__":  # the evaluation worker is a spawned process and imports this file again
    check()
