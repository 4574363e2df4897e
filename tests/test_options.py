"""What one `torch.compile` call asks for is refused where it is read, if nothing could be compiled that way."""

from __future__ import annotations

from pathlib import Path

import pytest

from torch_llmkernels.errors import SettingsError
from torch_llmkernels.options import read_request
from torch_llmkernels.settings import override


def test_close_matches_are_ours_and_inductors() -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'triton\.cudagraphs'"):
        read_request(None, {"triton.cudagraph": True})
    with pytest.raises(SettingsError, match="did you mean 'on_miss'"):
        read_request(None, {"onmiss": "search"})


def test_a_library_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"library_dir: {tmp_path}/nowhere is not a directory"):
        read_request(None, {"library_dir": str(tmp_path / "nowhere")})
    assert read_request(None, {"library_dir": str(tmp_path)}).library.root == tmp_path


@pytest.mark.parametrize("on_miss", ["search", "background"])
def test_a_search_without_a_language_model_is_an_error_that_names_the_knob(on_miss: str) -> None:
    with pytest.raises(SettingsError, match="'provider' or LLMKERNELS_PROVIDER"):
        read_request(None, {"on_miss": on_miss})
    with pytest.raises(SettingsError, match="unknown provider 'opneai'"):
        read_request(None, {"on_miss": on_miss, "provider": "opneai"})
    with override(provider="exchange"):
        assert read_request(None, {"on_miss": on_miss}).settings.provider == "exchange"
