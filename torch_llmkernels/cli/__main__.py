"""`python -m torch_llmkernels.cli`: the same as `llmkernels`."""

from __future__ import annotations

import sys

from torch_llmkernels.cli import main

sys.exit(main())
