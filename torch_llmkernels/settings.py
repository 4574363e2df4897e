"""Every knob in one table: name, type, default, one line of documentation.

A value comes from, in rising order: the default here, the environment (`LLMKERNELS_<NAME>`), `override(...)`, which is scoped
to a `with` block and to the current thread or task, and `torch.compile(options={...})`. Parsing is strict: a misspelt name or
value is a `SettingsError` that lists what would have been accepted.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch_llmkernels.errors import SettingsError

OnMiss = Literal["fallback", "search", "background", "error"]
Swap = Literal["fastest", "correct", "none"]
WholeGraph = Literal["auto", "stored", "measure"]
Tier = Literal["quick", "full"]
Preset = Literal["quick", "default", "thorough", "sequential"]


_ENVIRONMENT = "environment variable LLMKERNELS_"


def knob(default: Any, doc: str) -> Any:
    """A field of `Settings` with its one line of documentation."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The knobs. `options=` and `override` take them by these names, the environment as `LLMKERNELS_<NAME>`."""

    cache_dir: str = knob("", "the store's directory; empty: $XDG_CACHE_HOME/torch_llmkernels, else ~/.cache/torch_llmkernels")
    library_dir: str = knob("", "a kernel library to use instead of the shipped one")
    on_miss: OnMiss = knob(
        "fallback",
        "what a region that no kernel wins does: keep Inductor, search now, search behind, or raise if none is correct for it",
    )
    swap: Swap = knob("fastest", "which kernels are swapped in: those that win, every correct one (for tests), or none")
    whole_graph: WholeGraph = knob(
        "auto",
        "whether swaps pay in the whole graph: what precompile measured (stored); or else the first calls of an inference graph "
        "measure it (measure), or only where its kernels are so short that launching them may be what takes the time (auto)",
    )
    strict: bool = knob(False, "raise where the default is to log a reason and fall back to Inductor")
    verify: Tier = knob("quick", "the check a shipped kernel passes on this device before its first use")
    verify_budget_s: float = knob(120.0, "seconds that verifying the kernels of one graph may take; beyond it Inductor is kept")
    worker_timeout_s: float = knob(120.0, "seconds one evaluation may take before its worker is killed")
    min_speedup: float = knob(1.03, "a kernel is swapped in only if the best baseline's time over its own is at least this")
    fuel: int = knob(-1, "swap at most this many regions of a process (-1: no limit); to bisect a wrong result")
    specialize: bool = knob(False, "compile dynamic shapes as static ones for kernels that need it (adds guards)")
    max_regions: int = knob(2048, "regions of one graph that are looked up; the rest stay with Inductor")
    preset: Preset = knob("default", "the search preset")
    provider: str = knob("", "the language model: 'openai', 'replay:JOURNAL' or 'exchange:FOLDER'")
    model: str = knob("", "model names for the openai provider, comma separated, each optionally 'name=weight'")
    base_url: str = knob("", "endpoint of the openai provider; empty: the client's default")
    api_key_env: str = knob("OPENAI_API_KEY", "the environment variable that holds the key; the key itself is never stored")
    search_budget_s: float = knob(600.0, "seconds that one search from the compile path may take")
    search_budget_tokens: int = knob(1_000_000, "tokens, in and out, that one search may use")
    cxx: str = knob("", "the C++ compiler of the CPU target; empty: $CXX, else g++, else clang++")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Defaults updated by `LLMKERNELS_*`.

        Raises:
            SettingsError: for an unknown `LLMKERNELS_*` name or a value that does not parse.
        """
        environ = os.environ if environ is None else environ
        prefix = "LLMKERNELS_"
        found = {k[len(prefix):].lower(): v for k, v in environ.items() if k.startswith(prefix)}
        # the test-only variables are read by the test suite, not by the package
        found = {k: v for k, v in found.items() if not k.startswith("test_")}
        return cls().updated(found, origin=_ENVIRONMENT)

    def updated(self, values: Mapping[str, Any], origin: str = "option ") -> Settings:
        """A copy with `values` parsed and applied.

        Raises:
            SettingsError: for an unknown name or a value of the wrong type.
        """
        parsed = {}
        for name, value in values.items():
            if name not in KNOBS:
                raise SettingsError(unknown_name(name, KNOBS, origin))
            parsed[name] = _parse(name, value, _spelt(name, origin))
        return dataclasses.replace(self, **parsed)

    def store_directory(self) -> Path:
        """Where the store lives: `cache_dir`, else the XDG cache directory."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(root).expanduser() / "torch_llmkernels"


KNOBS: dict[str, str] = {f.name: f.metadata["doc"] for f in dataclasses.fields(Settings)}
_TYPES = get_type_hints(Settings)
A_TYPE: dict[type, str] = {int: "an integer", float: "a number", str: "text", tuple: "a list"}
"""A type of value in words, for errors."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def unknown_name(name: str, known: Iterable[str], origin: str, also: Sequence[str] = ()) -> str:
    """Two sentences for an unknown knob: what, the closest known names (of `also` too), and the whole list of `known`."""
    close = difflib.get_close_matches(name, [*known, *also], n=3 if also else 1)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"unknown {_spelt(name, origin)}{hint} Known: {', '.join(sorted(known))}"


def _spelt(name: str, origin: str) -> str:
    """The knob as its user wrote it: variables of the environment are in upper case."""
    return origin + (name.upper() if origin == _ENVIRONMENT else name)


def _parse(name: str, value: Any, what: str) -> Any:
    want = _TYPES[name]
    if get_origin(want) is Literal:
        choices = get_args(want)
        if value in choices:
            return value
        raise SettingsError(f"{what}: {value!r} is not one of {', '.join(map(repr, choices))}")
    if want is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in _TRUE + _FALSE:
            return text in _TRUE
        raise SettingsError(f"{what}: {value!r} is not a boolean (use one of {', '.join(_TRUE + _FALSE)})")
    if isinstance(value, bool):
        raise SettingsError(f"{what}: {value!r} is not {A_TYPE[want]}")
    try:
        number = want(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{what}: {value!r} is not {A_TYPE[want]}") from None
    least = -1 if name == "fuel" else 0
    if want is not str and not number >= least:  # neither is not-a-number, which no comparison would end
        raise SettingsError(f"{what}: {value!r} is below {least} or not a number")
    return number


_current: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("llmkernels_settings", default=None)


def current() -> Settings:
    """The settings in force here: the innermost `override`, else the environment's."""
    return _current.get() or Settings.from_environment()


@contextlib.contextmanager
def override(**values: Any) -> Iterator[Settings]:
    """Set knobs for a `with` block.

    Raises:
        SettingsError: for an unknown name or a value of the wrong type.
    """
    with using(current().updated(values)) as settings:
        yield settings


@contextlib.contextmanager
def using(settings: Settings) -> Iterator[Settings]:
    """Make these the settings in force for a `with` block, whatever the environment says."""
    token = _current.set(settings)
    try:
        yield settings
    finally:
        _current.reset(token)
