"""Deciding everything about a model before it is deployed; `run` has the story.

Not called `precompile`: importing a submodule of that name would put it over the function `torch_llmkernels.precompile`.
"""

from torch_llmkernels.precompilation.run import PrecompileReport, precompile

__all__ = ["PrecompileReport", "precompile"]
