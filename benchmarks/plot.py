"""Horizontal bars as SVG, written by hand: a plot that needs no plotting library, diffs well, and renders on any forge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

BAR, GAP, LABEL, PLOT, MARGIN = 16, 8, 330, 460, 24
FASTER, SLOWER, AXIS, TEXT = "#2f7d4f", "#b0483c", "#8a8a8a", "#555555"


def bars(title: str, rows: Sequence[tuple[str, float]]) -> str:
    """Ratios as bars from 1 on a logarithmic axis: to the right what is faster, to the left what is slower.

    Args:
        title: Above the plot.
        rows: Label and ratio, above zero, of each bar, top to bottom.
    """
    reach = max(1.0, *(abs(math.log2(ratio)) for _, ratio in rows))
    # the axis takes as much room on the left as the slowest bar needs, and no more
    left = max(0.0, *(-math.log2(ratio) for _, ratio in rows))
    unit = PLOT / (reach + left)
    zero = LABEL + left * unit
    height = 2 * MARGIN + 20 + len(rows) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + PLOT + 80}" height="{height}" font-family="sans-serif"',
        ' font-size="12">',
        f'<text x="8" y="{MARGIN - 6}" font-weight="bold" fill="{TEXT}">{escape(title)}</text>',
    ]
    for number, (label, ratio) in enumerate(rows):
        parts += _bar(label, ratio, zero, unit, MARGIN + 10 + number * (BAR + GAP))
    bottom = MARGIN + 10 + len(rows) * (BAR + GAP)
    parts.append(f'<line x1="{zero:.1f}" y1="{MARGIN}" x2="{zero:.1f}" y2="{bottom}" stroke="{AXIS}"/>')
    parts.append(f'<text x="{zero:.1f}" y="{bottom + 14}" text-anchor="middle" fill="{TEXT}">1x</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bar(label: str, ratio: float, zero: float, unit: float, top: float) -> list[str]:
    length = math.log2(ratio) * unit
    start, end = min(zero, zero + length), max(zero, zero + length)
    middle, color = top + BAR - 4, FASTER if ratio >= 1 else SLOWER
    return [
        f'<text x="{LABEL - 8}" y="{middle}" text-anchor="end" fill="{TEXT}">{escape(label)}</text>',
        f'<rect x="{start:.1f}" y="{top}" width="{max(end - start, 1.0):.1f}" height="{BAR}" fill="{color}"/>',
        f'<text x="{end + 6:.1f}" y="{middle}" fill="{TEXT}">{ratio:.2f}x</text>',
    ]
