"""Results -> one picture: what the attack sees against the score, and the time."""

import io
import math
from collections.abc import Sequence
from typing import Any

from ccu_jax.methods import REFERENCE
from ccu_jax.reports.summary import (
    Estimate,
    Row,
    auc,
    by_method,
    estimate,
    score,
    time_percent,
)

# Okabe and Ito's palette: told apart with any common colour blindness.
_CCU = {"ccu": "#E69F00", "ccu_plus": "#D55E00"}
_REFERENCES = {
    "original": "#000000",
    "retrain": "#666666",
    REFERENCE: "#0072B2",
    f"{REFERENCE}_2": "#88AED0",
}
_OTHERS = ("#009E73", "#56B4E9", "#CC79A7", "#8A7F00")
_MARKERS = "os^vDPXh<>"
_EDITIONS = {"sample": "SAMPLE EDITION, generated from clip art", "clipart": "CLIP ART"}


def draw(rows: Sequence[Row]) -> bytes:
    """Returns the picture as PNG; without rows an empty one that says so."""
    # Slow to import, and only a report needs it. No pyplot: no global state, no window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = by_method(rows)
    picture = Figure(figsize=(13, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2, width_ratios=(1.35, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    colours = _colours(list(groups))
    _draw_attack(left, groups, colours, _first(rows, "metric"))
    _draw_time(right, groups, colours)
    edition = _first(rows, "edition")
    title = f"{_first(rows, 'config')}: {_EDITIONS.get(edition, edition + ' data')}"
    loud = {"color": "#B35900"} if edition in _EDITIONS else {}
    picture.suptitle(
        title if groups else "No results", weight="bold", parse_math=False, **loud
    )
    # The labels go where the layout leaves room, so the layout comes first.
    picture.canvas.draw()
    picture.set_layout_engine("none")
    _label_points(left, groups, colours)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    return buffer.getvalue()


def _first(rows: Sequence[Row], key: str) -> str:
    return _plain(str(rows[0].get(key) or "unknown")) if rows else "unknown"


def _plain(name: str) -> str:
    """Returns a short name that the picture's font can show."""
    name = name.encode("ascii", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in name)[:28]


def _colours(names: list[str]) -> dict[str, str]:
    others = [name for name in names if name not in _CCU | _REFERENCES]
    cycled = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return cycled | _CCU | _REFERENCES


def _point(group: dict) -> tuple[Estimate, Estimate]:
    """Returns the estimates of the image attack's AUC and the fused test score."""
    return (
        estimate([auc(row, "image") for row in group.values()]),
        estimate([score(row, "test", "fused") for row in group.values()]),
    )


def _draw_attack(axes: Any, groups: dict, colours: dict, metric: str) -> None:
    for place, (name, group) in enumerate(groups.items()):
        x, y = _point(group)
        if not (math.isfinite(x.mean) and math.isfinite(y.mean)):
            continue
        ours = name in _CCU
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.half if math.isfinite(x.half) else None,
            yerr=y.half if math.isfinite(y.half) else None,
            marker="*" if ours else _MARKERS[place % len(_MARKERS)],
            markersize=17 if ours else 9,
            markeredgecolor="black" if ours else "white",
            color=colours[name],
            ecolor=(colours[name], 0.55),
            elinewidth=1.2,
            capsize=2,
            zorder=4 if ours else 3,
        )
    reference = _point(groups.get(REFERENCE, {}))[0].mean
    if math.isfinite(reference):
        axes.axvline(reference, color=colours[REFERENCE], linestyle="--", linewidth=1.2)
    axes.margins(0.14)
    axes.set_xlabel(f"image attack AUC (good: on the dashed line, {REFERENCE}'s)")
    axes.set_ylabel(f"test fused {metric}, %", parse_math=False)
    axes.set_title("What the attack still sees, and what is kept", fontsize=11)


def _label_points(axes: Any, groups: dict, colours: dict) -> None:
    """Writes each name beside its marker, at the place that hides the least."""
    from matplotlib.patheffects import withStroke

    points = {name: _point(group) for name, group in groups.items()}
    points = {
        name: (x, y)
        for name, (x, y) in points.items()
        if math.isfinite(x.mean) and math.isfinite(y.mean)
    }
    bars = [box for x, y in points.values() for box in _boxes(axes, x, y)]
    frame, taken = axes.get_window_extent(), []
    for name, (x, y) in points.items():
        label = axes.annotate(
            _plain(name),
            (x.mean, y.mean),
            (0, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            weight="bold" if name in _CCU else "normal",
            color=colours[name] if name in _CCU or name == REFERENCE else "#222222",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            parse_math=False,
            zorder=5,
        )

        def cost(place: tuple, label: Any = label) -> float:
            label.set(position=place[:2], horizontalalignment=place[2])
            box = label.get_window_extent().padded(2)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1
            crossed = sum(box.overlaps(bar) for bar in bars)
            hidden = sum(box.overlaps(other) for other in taken)
            return crossed + place[3] + 4 * (outside + hidden)

        best = min(_PLACES, key=cost)
        label.set(position=best[:2], horizontalalignment=best[2])
        taken.append(label.get_window_extent())


def _boxes(axes: Any, x: Estimate, y: Estimate) -> list[Any]:
    """Returns where a marker and its error bars lie, in pixels."""
    from matplotlib.transforms import Bbox

    dx = x.half if math.isfinite(x.half) else 0.0
    dy = y.half if math.isfinite(y.half) else 0.0
    corners = (
        [(x.mean - dx, y.mean), (x.mean + dx, y.mean)],
        [(x.mean, y.mean - dy), (x.mean, y.mean + dy)],
        [(x.mean, y.mean), (x.mean, y.mean)],
        [(x.mean, y.mean), (x.mean, y.mean)],  # twice: a marker weighs more
    )
    boxes = [Bbox(axes.transData.transform(ends)) for ends in corners]
    return [box.padded(2 if place < 2 else 8) for place, box in enumerate(boxes)]


# Offsets in points from a marker, with what being that far away costs.
_PLACES = [
    (dx * min(reach, 1.5), dy * reach, side, 2 * (reach - 1))
    for reach in (1, 1.6, 2.4, 3.4)
    for dx, dy, side in (
        (10, 10, "left"),
        (-10, 10, "right"),
        (10, -10, "left"),
        (-10, -10, "right"),
        (13, 0, "left"),
        (-13, 0, "right"),
        (0, 15, "center"),
        (0, -15, "center"),
    )
]


def _draw_time(axes: Any, groups: dict, colours: dict) -> None:
    reference = groups.get(REFERENCE, {})
    times = {
        name: time_percent(group, reference)
        for name, group in groups.items()
        if name != "original"
    }
    times = {name: time for name, time in times.items() if time.mean > 0}
    places = range(len(times))
    means = [time.mean for time in times.values()]
    axes.barh(places, means, color=[colours[name] for name in times], height=0.62)
    for place, (name, time) in enumerate(times.items()):
        half = f" ± {time.half:.2g}" if math.isfinite(time.half) else ""
        axes.annotate(
            f"{time.mean:.3g} %{half}",
            (time.mean, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            weight="bold" if name in _CCU else "normal",
        )
    axes.set_yticks(places, [_plain(name) for name in times])
    for label, name in zip(axes.get_yticklabels(), times, strict=True):
        label.set_parse_math(False)
        label.set_weight("bold" if name in _CCU else "normal")
    axes.invert_yaxis()
    if means:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(min(means) / 2.5, max(means) * 4)  # room for the numbers
    axes.set_xlabel(f"time, % of {REFERENCE}'s training (log scale)")
    axes.set_title("Time", fontsize=11)
    axes.grid(visible=False, axis="y")
