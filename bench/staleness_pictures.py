"""The pictures of docs/staleness.md, drawn from what bench/staleness.py measured: each for light and for dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, GOLD, GREY = "#3b7dd8", "#d9622b", "#2f9e62", "#c4519b", "#b88a00", "#808890"
LOAD_COLOURS = (BLUE, ORANGE, GREEN, PINK, GOLD, GREY)  # each readable on both grounds
GROUNDS: Mapping[str, Mapping[str, str]] = {
    "light": {"ink": "#1f2328", "grid": "#d8dee4"},
    "dark": {"ink": "#e6edf3", "grid": "#373e47"},
}


class Panel(NamedTuple):
    """One rule on the load that it is for: `off` and `on` are names of rules."""

    title: str
    load: str
    off: str
    on: str
    figure: str  # field of an outcome
    label: str


PANELS = (
    Panel("Pacing", "learner slower", "no pacing", "all rules", "mean", "mean staleness"),
    Panel("Newest first", "slow to apply", "no newest first", "all rules", "mean", "mean staleness"),
    Panel("Gate, one slow generator", "one slow generator", "no gate", "all rules", "time", "time, 1: perfect overlap"),
    Panel("What pacing costs", "learner slower", "no pacing", "all rules", "waiting", "learner waits, %"),
    Panel("Split, long tail", "long tail", "all rules", "split", "time", "time, 1: perfect overlap"),
    Panel("What split costs", "long tail", "all rules", "split", "left_out", "tokens left out, %"),
)


def draw(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """bound-*.svg, what S does; rules-*.svg, what each rule does."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for ground, colours in GROUNDS.items():
        inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        style = dict.fromkeys(inked, colours["ink"]) | {
            "grid.color": colours["grid"],
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",  # text stays text: small files
            "svg.hashsalt": "staleness",  # the same numbers give the same file
        }
        with matplotlib.rc_context(style):
            for name, height, plot in (("bound", 3.4, _plot_bounds), ("rules", 5.0, _plot_rules)):
                figure = Figure(figsize=(7.3, height), layout="constrained")
                plot(figure, runs)
                figure.savefig(folder / f"{name}-{ground}.svg", transparent=True, metadata={"Date": None})


def _line(runs: Sequence[Mapping[str, Any]], load: str, rules: str, figure: str) -> tuple[list[int], list[float]]:
    rows = sorted((run["bound"], run[figure]) for run in runs if (run["load"], run["rules"]) == (load, rules))
    factor = 100 if figure in ("waiting", "left_out") else 1
    return [bound for bound, _ in rows], [factor * value for _, value in rows]


def _plot_bounds(figure: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """What S buys, and how stale tokens then are, for every load with all rules on."""
    loads = list(dict.fromkeys(run["load"] for run in runs))
    panels = (("time", "run time, 1: perfect overlap"), ("waiting", "learner waits, %"), ("mean", "mean staleness"))
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for load, colour in zip(loads, LOAD_COLOURS, strict=True):
            axes.plot(*_line(runs, load, "all rules", name), "o-", color=colour, markersize=3.5, label=load)
        _finish(axes, title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def _plot_rules(figure: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Each rule off (orange) and on (blue), on the load that it is for."""
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        axes.plot(*_line(runs, panel.load, panel.off, panel.figure), "s--", color=ORANGE, markersize=3.5, label="off")
        axes.plot(*_line(runs, panel.load, panel.on, panel.figure), "o-", color=BLUE, markersize=3.5, label="on")
        axes.set_ylabel(panel.label)
        _finish(axes, panel.title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("S")
    axes.set_xticks([0, 1, 2, 4])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
