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
        SettingsError: for an unknown mode or option (it lists the valid ones), or a value of the wrong type.
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
    return Request(current().updated(ours), inductor)


def _unknown_option(name: str, known: Mapping[str, Any]) -> str:
    """Our few knobs come before Inductor's hundreds; what Inductor does not mean for users (`_name`) is left out."""
    public = [other for other in known if not other.startswith("_") and not other.isupper()]
    return f"{unknown_name(name, KNOBS, 'option ', also=public)}. Or one of Inductor's: {', '.join(sorted(public))}"
