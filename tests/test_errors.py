"""The error tree is documented where it is defined, and every error survives the way between processes."""

from __future__ import annotations

import pickle

import pytest

from torch_llmkernels import errors
from torch_llmkernels.errors import CompileError, LLMKernelsError

ALL = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, LLMKernelsError)]


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.__name__)
def test_every_error_is_in_the_tree_of_the_docstring(error: type[LLMKernelsError]) -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if error.__name__ in line.split()]
    assert len(lines) == 1
    parent = error.__mro__[1].__name__
    if parent != "Exception":
        assert _parent_in_docstring(error.__name__) == parent


def _parent_in_docstring(name: str) -> str:
    """The nearest earlier line with less indentation."""
    lines = (errors.__doc__ or "").splitlines()
    at = next(i for i, line in enumerate(lines) if name in line.split())
    column = lines[at].index(name)
    above = (line for line in reversed(lines[:at]) if line.strip(" │├└─") and _column(line) < column)
    return next(above).strip(" │├└─").split()[0]


def _column(line: str) -> int:
    return len(line) - len(line.lstrip(" │├└─"))


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.__name__)
def test_every_error_crosses_processes(error: type[LLMKernelsError]) -> None:
    before = error("what, where, what to do")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is error and str(after) == str(before)


def test_a_compile_error_keeps_the_compilers_words() -> None:
    after = pickle.loads(pickle.dumps(CompileError("refused", log="line 3: error")))
    assert (str(after), after.log) == ("refused", "line 3: error")


def test_attributes_added_later_survive_too() -> None:
    before = errors.WorkerDied("exit code 139")
    before.exit_code = 139
    assert pickle.loads(pickle.dumps(before)).exit_code == 139
