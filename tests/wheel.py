"""`make wheel-test` runs this in an empty directory with the built wheel installed: does a user's installation swap a kernel?"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Everything a user does: name the backend, compile, get a kernel of the wheel's own library.

    Raises:
        AssertionError: at the first thing that is not as it should be.
    """
    assert not any(Path.cwd().iterdir()), "run this in an empty directory: the wheel must need nothing else"
    with tempfile.TemporaryDirectory(prefix="llmkernels-wheel-") as store:
        os.environ["LLMKERNELS_CACHE_DIR"] = store
        import torch

        assert "llmkernels" in torch._dynamo.list_backends(), "the backend's entry point is not installed"
        check_library()
        check_swap()


def check_library() -> None:
    """The package is the wheel's, and it brings kernels."""
    import torch_llmkernels
    from torch_llmkernels.cache.library import default_library
    from torch_llmkernels.settings import current

    package = Path(torch_llmkernels.__file__).parent
    assert package.is_relative_to(sys.prefix), f"imported from {package}, not from the wheel in {sys.prefix}"
    library = default_library(current())
    assert library.root == package / "_library", library
    assert library.signatures(), "the wheel has no kernels"


def check_swap() -> None:
    """A layer norm with a kernel of the library in it equals the one without."""
    import torch

    import torch_llmkernels

    model, x = torch.nn.LayerNorm(256), torch.randn(64, 256)
    compiled = torch.compile(model, backend="llmkernels", options={"swap": "correct"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    swapped = [region for graph in torch_llmkernels.report() for region in graph.regions if region.swapped]
    assert swapped, torch_llmkernels.report()
    print(f"wheel: {swapped[0].signature} {swapped[0].reason}")


if __name__ == "__main__":
    main()
