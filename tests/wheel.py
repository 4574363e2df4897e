"""`make wheel-test` runs this in an empty directory with the built wheel installed: does a user's installation swap a kernel?

`wheel.py lend FOLDER` makes a folder that lends another environment the torch of this one.
"""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

NOT_DECLARED = {"sympy"}
"""What comes with torch for good: its symbolic sizes are made of it."""
OF_EXTRAS = {"cuda": "cuda-bindings", "ray": "ray"}
"""Modules of distributions that only extras declare, so they are not installed here."""


def lend(folder: Path) -> None:
    """Links to torch and to all that it requires, and to nothing else that is installed here: the wheel declares the rest."""
    from packaging.requirements import Requirement

    folder.mkdir(parents=True)
    wanted, seen = ["torch"], set()
    while wanted:
        name = wanted.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # an extra, or for another platform; `pip check` sees what is really missing
        if found.name in seen:
            continue
        seen.add(found.name)
        for top in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():  # parts of one namespace
                (folder / top).symlink_to(found.locate_file(top))
        required = map(Requirement, found.requires or ())
        wanted += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]


def main() -> None:
    """Everything a user does: name the backend, compile, get a kernel of the wheel's own library.

    Raises:
        AssertionError: at the first thing that is not as it should be.
    """
    assert not any(Path.cwd().iterdir()), "run this in an empty directory: the wheel must need nothing else"
    with tempfile.TemporaryDirectory(prefix="llmkernels-wheel-") as store:
        os.environ["LLMKERNELS_CACHE_DIR"] = store
        import torch

        assert not Path(torch.__file__).is_relative_to(sys.prefix), "pip has installed another torch than the one that is lent"
        assert "llmkernels" in torch._dynamo.list_backends(), "the backend's entry point is not installed"
        check_declared()
        check_imports()
        check_library()
        check_swap()


def check_imports() -> None:
    """Every module can be imported with what the wheel declares, extras left out."""
    import torch_llmkernels

    for module in pkgutil.walk_packages(torch_llmkernels.__path__, "torch_llmkernels."):
        if not module.name.endswith("__main__"):  # that one is the command line itself
            importlib.import_module(module.name)


def check_declared() -> None:
    """Whatever the code imports, inside functions too, is of a distribution that the wheel itself declares."""
    ours = distribution("torch_llmkernels")
    declared = {_plain(re.match(r"[\w.-]+", requirement)[0]) for requirement in ours.requires}
    owners, undeclared = packages_distributions(), {}
    for path in ours.files:
        if path.suffix == ".py":
            for module in _imported(path.read_text()) - sys.stdlib_module_names - NOT_DECLARED - {"torch_llmkernels"}:
                if not declared & {_plain(owner) for owner in owners.get(module, [OF_EXTRAS.get(module, "")])}:
                    undeclared[module] = str(path)
    assert not undeclared, f"imported, but not declared: {undeclared}"


def _imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def _plain(distribution_name: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution_name).lower()


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
    if sys.argv[1:2] == ["lend"]:
        lend(Path(sys.argv[2]))
    else:
        main()
