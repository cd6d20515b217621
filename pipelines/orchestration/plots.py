"""Pictures and tables for Dagster's metadata: small PNGs inside Markdown, so that nothing has to be served."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(points: Sequence[Mapping[str, Any]], x: str, lines: Sequence[str]) -> str:
    """Markdown image of `lines` over `x`, one panel each; a line without any value is left out.

    points: one mapping per x, None where a line has no value.
    """
    drawn = [name for name in lines if any(point.get(name) is not None for point in points)]
    figure = _figure(panels=max(len(drawn), 1))
    for axes, name in zip(figure.axes, drawn, strict=False):
        pairs = [(point[x], point[name]) for point in points if point.get(name) is not None]
        axes.plot(*zip(*pairs, strict=True), marker="." if len(pairs) < 50 else None)
        axes.set_title(name)
        axes.set_xlabel(x)
    return _image(figure, " and ".join(drawn) or "nothing measured")


def histograms(series: Mapping[str, NDArray[Any]], title: str) -> str:
    """Markdown image with one histogram per series of numbers; an empty series is left out."""
    filled = {name: values for name, values in series.items() if len(values)}
    figure = _figure(panels=max(len(filled), 1))
    for axes, (name, values) in zip(figure.axes, filled.items(), strict=False):
        low, high = float(np.min(values)), float(np.max(values))
        # Unit vectors have one length but for rounding: a range of their own width would draw the rounding alone.
        axes.hist(values, bins=40, range=(min(low, 0.9), max(high, 1.1)))
        axes.set_title(f"{title}: {name}")
    return _image(figure, title)


def markdown_table(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; pipes and line ends in cells are escaped."""
    lines = [_line(columns), _line(["---"] * len(columns)), *(_line([_cell(value) for value in row]) for row in rows)]
    return "\n".join(lines)


def _figure(panels: int) -> "Figure":
    # The object interface never touches pyplot: no global backend, no figure that stays open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * panels, 2.6), layout="constrained")
    figure.subplots(1, panels)
    return figure


def _image(figure: "Figure", title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=70)
    return f"![{title}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
