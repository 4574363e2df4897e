"""Deciding everything about a model before it is deployed; `run` has the story."""

from torch_llmkernels.precompile.run import PrecompileReport, precompile

__all__ = ["PrecompileReport", "precompile"]
