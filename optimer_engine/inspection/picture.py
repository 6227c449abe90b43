"""The findings as a picture: cosines of the whole, and norms over the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine.errors import MissingExtraError, OutputError


def draw(data: dict[str, Any], out: Path) -> None:
    """Write `data` (see `report.as_data`) as an image; the suffix says which kind.

    Raises:
        MissingExtraError: without matplotlib.
        OutputError: when the file cannot be written, or has an unknown suffix.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "matplotlib is not installed",
            where="--plot",
            todo="pip install 'optimer-engine[report]'",
        ) from error
    names = data["names"]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    matrix, lines, bars = figure.subplots(1, 3)
    cosines = np.array(data["whole"]["cosines"], float)
    image = matrix.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    for (row, column), value in np.ndenumerate(cosines):
        color = "white" if abs(value) > 0.6 else "black"
        matrix.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    matrix.set_xticks(range(len(names)), names, rotation=45, ha="right")
    matrix.set_yticks(range(len(names)), names)
    matrix.set_title("cosine")
    figure.colorbar(image, ax=matrix, shrink=0.7)
    layers = {key: group for key, group in data["layers"].items() if key != "-"}
    relative = all("norm_ratio" in group for group in data["modules"].values())
    key = "norm_ratio" if relative else "norms"
    for number, name in enumerate(names):
        heights = [group[key][number] for group in layers.values()]
        lines.plot([int(layer) for layer in layers], heights, marker=".", label=name)
    lines.set_xlabel("layer")
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.set_ylabel("norm / base's norm" if relative else "norm")
    lines.set_ylim(0, 1.1 * max(lines.get_ylim()[1], 0.0))
    if layers:
        lines.legend(fontsize=7)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [group[key][number] for group in data["modules"].values()]
        places = np.arange(len(heights)) + number * width
        bars.bar(places, [h or 0.0 for h in heights], width, label=name)
    middle = np.arange(len(data["modules"])) + 0.4 - width / 2
    bars.set_xticks(middle, list(data["modules"]), rotation=45, ha="right")
    bars.set_title("by module type")
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot be written: {error}", where=str(out), todo="name a .png, .svg or .pdf file"
        ) from error
