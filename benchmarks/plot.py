"""How the pictures look: large type on a card of its own, to be read on a phone and in the dark.

`make` installs matplotlib apart, in `.cache/plot`, for the few commands that draw; without it they don't.
"""

import importlib.util
from pathlib import Path
from typing import Any

CAN_DRAW = importlib.util.find_spec("matplotlib") is not None

# Told apart by all kinds of eyes (Okabe and Ito), and by their dashes.
STYLES = {
    "sink cache": dict(color="#D55E00", linewidth=4, zorder=3),
    "full cache": dict(color="#0072B2", linewidth=2, linestyle="--"),
    "old cache": dict(color="#CC79A7", linewidth=2),
    "window without sinks": dict(color="#009E73", linewidth=2, linestyle="-."),
    "window of 16 bits": dict(color="#0072B2", linewidth=2, linestyle="--"),
    "window of 8 bits": dict(color="#D55E00", linewidth=4, zorder=3),
    "sink cache, 8 bits": dict(color="#E69F00", linewidth=3, linestyle=(0, (5, 1))),
    "recomputation": dict(color="#000000", linewidth=2, linestyle=":"),
}


def panels(rows: int, height: float) -> tuple[Any, Any]:
    """A figure of `rows` panels under each other, which share what they are drawn against."""
    figure, axes = _subplots(18, rows, 1, figsize=(8, height), sharex=True)
    return figure, axes[:, 0]


def panels_side_by_side(columns: int) -> tuple[Any, Any]:
    """A wide figure of `columns` panels, in type that can still be read where it is 350 pixels wide."""
    figure, axes = _subplots(31, 1, columns, figsize=(16, 4.7))
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.08)
    return figure, axes[0]


def _subplots(font_size: int, *shape: int, **settings) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": font_size, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams.update({"axes.titlesize": 1.1 * font_size, "lines.linewidth": font_size / 10})
    figure, axes = pyplot.subplots(*shape, squeeze=False, facecolor="white", layout="constrained", **settings)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    return figure, axes


def entitle(panel: Any, title: str, marks: list[int]) -> None:
    """Say what a panel shows, and mark places with dotted lines."""
    panel.set_title(title, loc="left", fontweight="bold")
    for place in marks:
        panel.axvline(place, color="#777777", linestyle=":")


def logarithmic(panel: Any) -> None:
    """Let powers be even steps, and say the numbers in full."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def finish(figure: Any, axes: Any, path: Path, columns: int = 2) -> None:
    """Put one legend below all panels, and write the picture (PNG: the Hub's cards don't show SVG)."""
    handles, labels = max((panel.get_legend_handles_labels() for panel in axes), key=lambda legend: len(legend[1]))
    spacing = dict(handlelength=1.3, handletextpad=0.4, columnspacing=1.0) if columns > 2 else {}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, **spacing)
    figure.savefig(path, dpi=100 if columns > 2 else 110, metadata={"Software": None})
