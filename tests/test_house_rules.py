"""The rules that keep the package readable, checked by reading its source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import torch_llmkernels

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "torch_llmkernels"
ROOT = "torch_llmkernels"
FILES = sorted(PACKAGE.rglob("*.py"))
UNFINISHED = ("TODO", "FIXME", "XXX", "HACK", "session")


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def unit(module: str) -> str:
    """The folder of the package, or the module at its top, that `module` belongs to; the package itself is ``."""
    return module.split(".")[1] if "." in module else ""


def written_order() -> list[list[str]]:
    """The import order as docs/design.md has it, line by line. Units of one line that `|` keeps apart are all folders."""
    text = (REPOSITORY / "docs" / "design.md").read_text()
    block = re.search(r"Imports go down this list.*?```\n(.*?)```", text, re.DOTALL)
    assert block, "docs/design.md has lost the list of import tiers"
    lines = []
    for line in block[1].splitlines():
        folders = re.findall(r"(?:^|\|)\s*(\w+)/", line)
        lines.append(folders or re.split(r"\s{5,}", line)[0].split())
    return lines


ORDER = written_order()
UNITS = {name: (tier, place) for tier, names in enumerate(ORDER) for place, name in enumerate(names)}
APART = [set(names) for names in ORDER if len(names) > 1 and all((PACKAGE / name).is_dir() for name in names)]


def imports(tree: ast.AST, module: str, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """(module of this package, line) for every import; without `lazy`, only those that run when the module is imported."""
    for node in ast.walk(tree) if lazy else _eager(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == ROOT)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write imports in full"
            if (node.module or "").split(".")[0] == ROOT:
                yield from ((_submodule(f"{node.module}.{alias.name}"), node.lineno) for alias in node.names)


def _submodule(dotted: str) -> str:
    return dotted if dotted in MODULES else dotted.rpartition(".")[0]


def _eager(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _eager(child)


def test_the_written_order_names_every_part_of_the_package() -> None:
    parts = {unit(name) for name in MODULES} - {""}
    assert parts - set(UNITS) == set(), "add these to the list of import tiers in docs/design.md"


@pytest.mark.parametrize("module", [name for name in MODULES if unit(name)])
def test_imports_go_down_the_written_order(module: str) -> None:
    """Lazy imports count too: they hide a dependency, they do not remove it."""
    here = unit(module)
    wrong = []
    for target, line in imports(TREES[module], module):
        there = unit(target)
        if there and there != here and not _may_import(here, there):
            wrong.append(f"line {line}: {here} imports {target}")
    assert wrong == []


def _may_import(here: str, there: str) -> bool:
    """Earlier in the list or in the line, unless the two are kept apart: stages of a tier do not know each other."""
    if here not in UNITS or there not in UNITS:
        return True  # reported by the test above
    return UNITS[there] < UNITS[here] and not any({here, there} <= apart for apart in APART)


def test_no_import_cycles() -> None:
    graph = {name: {t for t, _ in imports(tree, name, lazy=False) if t not in (name, ROOT)} for name, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module: str) -> None:
    tree = TREES[module]
    named = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    missing = [f"line {n.lineno}: {n.name}" for n in named if not ast.get_docstring(n)]
    assert ast.get_docstring(tree) and missing == []


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_annotated(module: str) -> None:
    functions = [n for n in ast.walk(TREES[module]) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    missing = [f"line {f.lineno}: {f.name}" for f in functions if not f.returns and f.name != "__init__"]
    missing += [f"line {f.lineno}: {f.name}({a.arg})" for f in functions for a in _arguments(f) if not a.annotation]
    assert missing == []


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [a for a in named if a is not None and a.arg not in ("self", "cls") and not a.arg.startswith("_")]


@pytest.mark.parametrize(
    "path", sorted(p for p in PACKAGE.rglob("*.*") if p.suffix in (".py", ".md", ".hpp", ".cuh", ".html")), ids=str
)
def test_nothing_is_left_unfinished(path: Path) -> None:
    found = re.findall(rf"\b(?:{'|'.join(UNFINISHED)})s?\b", path.read_text())
    assert found == []


def test_importing_the_package_is_light() -> None:
    """torch imports it while it reads TORCH_LOGS, before most of torch is there."""
    heavy = "{'torch', 'torch._inductor', 'openai', 'diskcache', 'filelock', 'numpy', 'rich'}"
    subprocess.run([sys.executable, "-c", f"import sys, torch_llmkernels; assert not {heavy} & set(sys.modules)"], check=True)


def test_light_modules_do_not_import_torch() -> None:
    light = (
        "errors settings task evaluation kernels.source kernels.launch cache.store cache.library cache.bundle cli"
    )
    names = ", ".join(f"{ROOT}.{name}" for name in light.split())
    subprocess.run([sys.executable, "-c", f"import sys, {names}; assert 'torch' not in sys.modules"], check=True)


def test_a_lookup_imports_neither_a_client_nor_the_search() -> None:
    code = f"import sys, {ROOT}.resolve; assert not any(m == 'openai' or m.startswith('{ROOT}.search') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_imported_is_declared() -> None:
    """What the built wheel needs is what it says it needs; sympy comes with torch, `cuda` is cuda-bindings'."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["cuda"], *project["optional-dependencies"]["ray"]]
    known = {re.match(r"[\w-]+", line)[0] for line in declared} | {"cuda", "sympy", ROOT, *sys.stdlib_module_names}
    imported: set[str] = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.split(".")[0])
    assert imported - known == set()


@pytest.mark.parametrize("name", torch_llmkernels.__all__)
def test_exported_names_exist(name: str) -> None:
    assert getattr(torch_llmkernels, name) is not None


@pytest.mark.parametrize("page", sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]), ids=lambda p: p.name)
def test_links_between_pages_work(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_ruff_is_content() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "."], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
