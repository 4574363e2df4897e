"""Importing this makes the scripts of `benchmarks/` importable, as they are for one another when one of them is run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
