"""Plain SVG: points, lines and heat maps that need no script, no library and no network.

Colours are CSS variables of the page, so one drawing serves its light and its dark form.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34


class Chart:
    """One pair of axes; elements are drawn in the order they are added.

    Args:
        x, y: all values that must fit, to set the ranges.
        x_label, y_label: of the axes.
    """

    def __init__(self, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> None:
        self._x, self._y = _range(x), _range(y)
        self._labels = x_label, y_label
        self._drawn: list[str] = []

    def dots(
        self, x: Sequence[float], y: Sequence[float], titles: Sequence[str], kind: str = "dot"
    ) -> None:
        """Points, each with the text it shows under the mouse."""
        for a, b, title in zip(x, y, titles, strict=True):
            self._drawn.append(
                f'<circle class="{kind}" cx="{self._at_x(a):.1f}" cy="{self._at_y(b):.1f}" r="3">'
                f"<title>{escape(title)}</title></circle>"
            )

    def steps(self, x: Sequence[float], y: Sequence[float]) -> None:
        """A line that keeps each value until the next."""
        path = ""
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            level = f"V{self._at_y(b):.1f}"
            path += f"M{self._at_x(a):.1f},{self._at_y(b):.1f}" if i == 0 else (
                f"H{self._at_x(a):.1f}{level}"
            )  # fmt: skip
        self._drawn.append(f'<path class="line" d="{path}"/>')

    def heat(self, values: np.ndarray) -> None:
        """A grid [rows, columns] over the whole plot, row 0 at the bottom; low is strong."""
        rows, columns = values.shape
        low, high = float(values.min()), float(values.max())
        wide = (WIDTH - LEFT - RIGHT) / columns
        tall = (HEIGHT - TOP - BOTTOM) / rows
        for (i, j), value in np.ndenumerate(values):
            strength = 1.0 - (float(value) - low) / ((high - low) or 1.0)
            self._drawn.append(
                f'<rect class="heat" x="{LEFT + j * wide:.1f}"'
                f' y="{HEIGHT - BOTTOM - (i + 1) * tall:.1f}" width="{wide + 0.5:.1f}"'
                f' height="{tall + 0.5:.1f}" style="--strong:{strength**3:.0%}"/>'
            )

    def svg(self) -> str:
        """The drawing, with axes and their ends labelled."""
        x_label, y_label = (escape(label) for label in self._labels)
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        ends = [
            (LEFT, bottom + 14, "start", self._x[0]),
            (right, bottom + 14, "end", self._x[1]),
            (LEFT - 4, bottom, "end", self._y[0]),
            (LEFT - 4, TOP + 9, "end", self._y[1]),
        ]
        labels = "".join(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}">{_label(value)}</text>'
            for x, y, anchor, value in ends
        )
        middle = (TOP + bottom) / 2
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{y_label} by {x_label}">'
            f"{''.join(self._drawn)}"
            f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{right}"/>{labels}'
            f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>'
            f'<text transform="translate(12,{middle}) rotate(-90)" text-anchor="middle">{y_label}'
            "</text></svg>"
        )

    def _at_x(self, value: float) -> float:
        share = (value - self._x[0]) / (self._x[1] - self._x[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def _at_y(self, value: float) -> float:
        share = (value - self._y[0]) / (self._y[1] - self._y[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def matrix(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A table of numbers from -1 to 1 as an SVG, the stronger the further from 0."""
    cell, left = 56, 12 + 7 * max(map(len, names))
    width, height = left + cell * len(names) + 4, 24 + cell * len(names)
    drawn = []
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        y = 20 + i * cell
        drawn.append(
            f'<text x="{left - 6}" y="{y + cell / 2 + 3}" text-anchor="end">{escape(name)}</text>'
            f'<text x="{left + (i + 0.5) * cell}" y="14" text-anchor="middle">{escape(name)}</text>'
        )
        for j, value in enumerate(row):
            x = left + j * cell
            kind = "heat" if value is None or value >= 0 else "against"
            drawn.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}"'
                f' style="--strong:{0.08 + 0.72 * min(1.0, abs(value or 0.0)):.0%}"/>'
                f'<text class="ink" x="{x + cell / 2 - 1}" y="{y + cell / 2 + 3}"'
                f' text-anchor="middle">{"–" if value is None else f"{value:.3f}"}</text>'
            )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img"'
        f' aria-label="cosines between vectors">{"".join(drawn)}</svg>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = float(min(values)), float(max(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)
