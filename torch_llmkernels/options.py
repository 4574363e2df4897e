"""`torch.compile(mode=, options=)` taken apart into our knobs and Inductor's config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from torch_llmkernels.cache.library import Library
from torch_llmkernels.errors import SettingsError
from torch_llmkernels.settings import KNOBS, Settings, current, unknown_name

PRESETS = {"max-autotune": "thorough", "max-autotune-no-cudagraphs": "thorough"}
"""The search preset that a mode of `torch.compile` stands for; every other mode leaves the knob as it is."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What one `torch.compile` call asked for.

    Attributes:
        settings: Our knobs: environment, `override`, the mode's preset, then `options`.
        inductor: torch's own front end of Inductor, built from the same mode and Inductor's share of the options. Calling
            it is exactly what `backend="inductor"` does; its `config` is the patch of Inductor's config.
    """

    settings: Settings
    inductor: Any

    @functools.cached_property
    def library(self) -> Library:
        """The kernels to consider. A region that one of them serves is taken before a longer one that none does."""
        from torch_llmkernels.cache.library import default_library

        return default_library(self.settings)

    def inductor_option(self, name: str) -> Any:
        """The value of an Inductor option under this request."""
        from torch._inductor import config

        return self.inductor.config.get(name, config.get_config_copy()[name])


def read_request(mode: str | None, options: Mapping[str, Any] | None) -> Request:
    """The request of one `torch.compile` call.

    Args:
        mode: One of Inductor's modes, or None.
        options: Our knobs by name, and Inductor's options as `torch._inductor.list_options()` names them, with `-` for `_`
            allowed in both.

    Raises:
        SettingsError: for an unknown mode or option (it lists the valid ones), a value of the wrong type, a library that is not
            there, or a search without a language model.
    """
    from torch._inductor import config, list_mode_options

    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise SettingsError(f"unknown mode {mode!r}; torch.compile offers {', '.join(map(repr, modes))}")
    known = config.get_config_copy()
    ours: dict[str, Any] = {"preset": PRESETS[mode]} if mode in PRESETS else {}
    theirs: dict[str, Any] = {}
    for name, value in (options or {}).items():
        plain = name.replace("-", "_")
        if plain not in KNOBS and plain not in known:
            raise SettingsError(_unknown_option(name, known))
        (ours if plain in KNOBS else theirs)[plain] = value
    try:
        inductor = torch._TorchCompileInductorWrapper(mode, theirs, None)
    except RuntimeError as error:
        raise SettingsError(str(error)) from None
    request = Request(current().updated(ours), inductor)
    _check(request)
    return request


def _check(request: Request) -> None:
    """Refuse knobs that nothing can be compiled with as asked: later, each graph would go to Inductor for that reason alone.

    Raises:
        SettingsError: for a library that is not there, or a search without a usable provider.
    """
    if request.settings.library_dir:
        _ = request.library
    if request.settings.on_miss in ("search", "background"):
        _check_provider(request.settings)


@functools.lru_cache(maxsize=8)  # once, not for every graph; an error is not remembered
def _check_provider(settings: Settings) -> None:
    from torch_llmkernels.search.llm import provider_for

    if not settings.provider:
        raise SettingsError(
            f"on_miss={settings.on_miss!r} has no language model to ask: set the option 'provider' or LLMKERNELS_PROVIDER to "
            "'openai', 'replay:JOURNAL' or 'exchange:FOLDER', or leave on_miss at 'fallback'"
        )
    folder = settings.store_directory()  # stands in for the folder of a run; nothing is written
    provider_for(settings.provider, folder, models=settings.model, base_url=settings.base_url, api_key_env=settings.api_key_env)


def _unknown_option(name: str, known: Mapping[str, Any]) -> str:
    """Our few knobs are listed; of Inductor's hundreds only what is close, without what it does not mean for users (`_name`)."""
    public = [other for other in known if not other.startswith("_") and not other.isupper()]
    ours = unknown_name(name, KNOBS, "option ", also=public)
    return f"{ours} (llmkernels settings explains them); and Inductor's, which torch._inductor.list_options() lists"
