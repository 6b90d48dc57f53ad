"""The figure of a report: test score against attack AUC, and unlearning time."""

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ccu_jax.methods import CONTROL, REFERENCE
from ccu_jax.reports.summary import Estimate, MethodResults, Row, group_by_method

if TYPE_CHECKING:  # Matplotlib is slow to import, and only a report needs it.
    from matplotlib.axes import Axes

Points = dict[str, tuple[Estimate, Estimate]]
_OURS = ("ccu", "ccu_plus")  # drawn as stars, in bold
# The palette of Okabe & Ito, distinguishable by color-blind readers.
_COLORS = {
    "ccu": "#E69F00",
    "ccu_plus": "#D55E00",
    "original": "#000000",
    "retrain": "#666666",
    REFERENCE: "#0072B2",
    CONTROL: "#88AED0",
}
_OTHER_COLORS = ("#009E73", "#56B4E9", "#CC79A7", "#8A7F00")
_MARKERS = "os^vDPXh<>"
_EDITIONS = {"sample": "SAMPLE EDITION, generated images", "clipart": "CLIP ART"}


def draw(rows: Sequence[Row]) -> bytes:
    """Draws the figure as PNG; without rows, empty axes titled "No results"."""
    # Avoid pyplot, which keeps global state and may open a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = group_by_method(rows)
    others = [name for name in groups if name not in _COLORS]
    colors = _COLORS | dict(zip(others, itertools.cycle(_OTHER_COLORS), strict=False))
    figure = Figure(figsize=(13, 5.6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    first = rows[0] if rows else {}
    config, metric, edition = (
        _to_displayable(str(first.get(key) or "unknown"))
        for key in ("config", "metric", "edition")
    )
    points = _compute_points(groups)
    _draw_attack(left, points, colors)
    left.set_ylabel(f"test fused {metric}, %", parse_math=False)
    _draw_time(right, groups, colors)
    title = f"{config}: {_EDITIONS.get(edition, f'{edition} data')}"
    figure.suptitle(
        title if rows else "No results",
        weight="bold",
        color="#B35900" if edition in _EDITIONS else "black",
        parse_math=False,
    )
    canvas.draw()  # compute the layout, which label positions depend on
    figure.set_layout_engine("none")
    _label_points(left, points, colors)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _to_displayable(name: str) -> str:
    """Replaces characters that the font lacks and truncates to 28 characters."""
    name = name.encode("ascii", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in name)[:28]


def _compute_points(groups: dict[str, MethodResults]) -> Points:
    """Returns image attack AUC and fused test score of methods that have both."""
    points = {
        name: (group.mean_attack_auc("image"), group.mean_score("test", "fused"))
        for name, group in groups.items()
    }
    return {n: xy for n, xy in points.items() if all(math.isfinite(e.mean) for e in xy)}


def _choose_weight(name: str) -> str:
    return "bold" if name in _OURS else "normal"


def _draw_attack(axes: "Axes", points: Points, colors: dict[str, str]) -> None:
    """Draws a point with error bars per method, and a line at the reference's AUC."""
    for index, (name, (x, y)) in enumerate(points.items()):
        is_ours = name in _OURS
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.ci_half_width if x.count > 1 else None,
            yerr=y.ci_half_width if y.count > 1 else None,
            marker="*" if is_ours else _MARKERS[index % len(_MARKERS)],
            markersize=17 if is_ours else 9,
            markeredgecolor="black" if is_ours else "white",
            color=colors[name],
            ecolor=(colors[name], 0.55),
            elinewidth=1.2,
            capsize=2,
            zorder=4 if is_ours else 3,
        )
    if REFERENCE in points:
        x = points[REFERENCE][0].mean
        axes.axvline(x, color=colors[REFERENCE], linestyle="--", linewidth=1.2)
    axes.margins(0.14)
    axes.set_xlabel(f"image attack AUC (target: the dashed line, {REFERENCE})")
    axes.set_title("Attack AUC and test score", fontsize=11)


def _label_points(axes: "Axes", points: Points, colors: dict[str, str]) -> None:
    """Labels each point with the name of its method."""
    from adjustText import adjust_text
    from matplotlib.patheffects import withStroke

    texts = [
        axes.text(
            x.mean,
            y.mean,
            _to_displayable(name),
            fontsize=9.5,
            weight=_choose_weight(name),
            color=colors[name] if name in (*_OURS, REFERENCE) else "#222222",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            parse_math=False,
            zorder=5,
        )
        for name, (x, y) in points.items()
    ]
    # Limit iterations, not time as by default, so that figures are reproducible.
    arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7}
    adjust_text(texts, ax=axes, iter_lim=100, arrowprops=arrow)


def _draw_time(
    axes: "Axes", groups: dict[str, MethodResults], colors: dict[str, str]
) -> None:
    """Draws the time of each method as a bar, in percent of the reference's."""
    reference = groups.get(REFERENCE, MethodResults())
    times = {
        name: group.mean_time_percent(reference)
        for name, group in groups.items()
        if name != "original"
    }
    times = {name: time for name, time in times.items() if time.mean > 0}
    indices, means = range(len(times)), [time.mean for time in times.values()]
    axes.barh(indices, means, color=[colors[name] for name in times], height=0.62)
    for index, (name, time) in enumerate(times.items()):
        interval = f" ± {time.ci_half_width:.2g}" if time.count > 1 else ""
        axes.annotate(
            f"{time.mean:.3g} %{interval}",
            (time.mean, index),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            weight=_choose_weight(name),
        )
    axes.set_yticks(indices, [_to_displayable(name) for name in times])
    for label, name in zip(axes.get_yticklabels(), times, strict=True):
        label.set_parse_math(False)
        label.set_fontweight(_choose_weight(name))
    axes.invert_yaxis()
    if means:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(min(means) / 2.5, max(means) * 4)  # room for the numbers
    axes.set_xlabel(f"time, % of {REFERENCE}'s training (log scale)")
    axes.set_title("Unlearning time", fontsize=11)
    axes.grid(visible=False, axis="y")
