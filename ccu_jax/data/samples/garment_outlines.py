"""The outlines of the Fashion200k sample's clothes: polygons.

x goes from a garment's middle line, y down from its highest point; both are in units
of half its shoulders.
"""

import math

from ccu_jax.data.samples.garments import Garment

Point = tuple[float, float]
Polygon = tuple[int, list[Point]]  # what to fill with, and its corners
_CLOTH, _HOLE = 255, 0


def outline(
    garment: Garment, spread: float, lean: float
) -> tuple[list[Polygon], list[Polygon]]:
    """The polygons of its cloth, and of the marks on it.

    Args:
        garment: What to draw.
        spread: How far sleeves or legs are spread, in [0, 1].
        lean: How far its lower end is pulled aside.
    """
    match garment.cut.kind:
        case "skirt":
            cloth, marks = _skirt(garment)
        case "pants":
            cloth, marks = _pants(garment, spread)
        case _:
            cloth, marks = _body(garment, spread)
    slope = 0.25 * lean / garment.length
    for polygons in (cloth, marks):
        for number, (fill, points) in enumerate(polygons):
            polygons[number] = fill, [(x + slope * y * y, y) for x, y in points]
    return cloth, marks


def _mirrored(right: list[Point]) -> list[Point]:
    """A closed outline from its right half, told from the top to the bottom."""
    return right + [(-x, y) for x, y in reversed(right)]


def _sides(garment: Garment, heights: dict[float, float]) -> list[Point]:
    """The right edge: half widths by height, cut off or drawn out to its length."""
    kept = [(w, y) for y, w in heights.items() if y < garment.length - 0.3]
    ends = garment.hem if garment.length > 2.6 else min(garment.hem, kept[-1][0] + 0.3)
    edge = [*kept, (ends, garment.length), (0.5 * ends, garment.length + 0.06)]
    return [
        (x + garment.fringe * math.sin(7 * y + 30 * x), y + garment.fringe * (n % 2))
        for n, (x, y) in enumerate(_filled(edge))
    ]


def _filled(edge: list[Point]) -> list[Point]:
    """The same edge with more points on it."""
    return [
        ((1 - t) * x + t * p, (1 - t) * y + t * q)
        for (x, y), (p, q) in zip(edge[:-1], edge[1:], strict=True)
        for t in (0.0, 0.33, 0.67)
    ] + edge[-1:]


def _body(garment: Garment, spread: float) -> tuple[list[Polygon], list[Polygon]]:
    """A dress, a jacket or a top."""
    wide, deep = garment.neck
    heights = {0.95: 0.8, 1.7: garment.waist, 2.5: garment.hip}
    if garment.bare:
        heights = {0.75: 0.74} | heights
    elif garment.sleeve < 0.3:  # straps
        heights = {0.0: wide + garment.flare, 0.6: 0.1 + wide + garment.flare} | heights
    else:
        heights = {0.0: wide + 0.15, 0.18: 0.98} | heights
    cloth = [(_CLOTH, _mirrored(_sides(garment, heights)))]
    if garment.bare:
        cloth.append((_HOLE, [(-0.3, 0.7), (0.0, 0.75 + 0.3 * deep), (0.3, 0.7)]))
        return cloth, []
    if garment.sleeve >= 0.3:
        for side in (1, -1):
            cloth.append((_CLOTH, _sleeve(garment, side, spread)))
    low = [(wide, -0.2), (0.7 * wide, 0.7 * deep), (0.0, deep)]
    cloth.append((_HOLE, _mirrored(low if garment.round else [low[0], low[2]])))
    return cloth, _front(garment, wide, deep)


def _sleeve(garment: Garment, side: int, spread: float) -> list[Point]:
    angle = 0.25 + 0.9 * spread
    sine, cosine = math.sin(angle), math.cos(angle)
    thick = 0.24 + 0.1 * garment.flare
    end = thick + (garment.flare - 0.2) * garment.sleeve / 2.5
    long = garment.sleeve
    corners = ((0.0, thick), (long, end), (long, -end), (0.1, -thick))
    return [
        (side * (0.8 + far * sine + off * cosine), 0.3 + far * cosine - off * sine)
        for far, off in corners
    ]


def _front(garment: Garment, wide: float, deep: float) -> list[Polygon]:
    """Marks on the front of a jacket or a top."""
    length, marks = garment.length, []
    front = garment.cut.front
    if front in ("open", "quilted", "collar", "pockets"):
        marks.append((255, [(0.0, deep), (0.03, length)]))
    if front == "collar":
        for side in (1, -1):
            tip = side * (wide + 0.2), 0.5
            fold = [(side * wide, 0.0), tip, (0.0, 1.2 + deep / 2)]
            marks += [(110, fold), (255, fold[:2])]
    if front == "quilted":
        rows = 4 + int(3 * garment.scale)
        heights = (0.4 + n * (length - 0.4) / rows for n in range(1, rows))
        marks += [(150, [(-1.0, y), (1.0, y)]) for y in heights]
    if front == "buttons":
        heights = (deep + 0.15 + n * (length - deep) / 6 for n in range(6))
        marks += [(255, _square(0.0, y, 0.06)) for y in heights]
        marks.append((90, [(0.12, deep), (0.12, length)]))
    if front == "pockets":
        marks += [(120, _square(side * 0.42, 0.95, 0.17)) for side in (1, -1)]
    return marks


def _skirt(garment: Garment) -> tuple[list[Polygon], list[Polygon]]:
    band = 0.08 + 0.3 * garment.flare
    edge = _sides(garment, {0.0: garment.waist - 0.08, 0.75: 0.8 * garment.hip})
    many = int(garment.folds[0])
    pleats = [
        (60, [(x * garment.waist, band), (x * garment.hem, garment.length)])
        for x in (2 * (n + 0.5) / many - 1 for n in range(many))
    ]
    marks = [(140, [(-1.0, band), (1.0, band)])]
    return [(_CLOTH, _mirrored(edge))], marks + (pleats if garment.round else [])


def _pants(garment: Garment, spread: float) -> tuple[list[Polygon], list[Polygon]]:
    length, end, hip = garment.length, garment.hem, 0.85 * garment.hip
    foot = max(end + 0.02 + 0.3 * spread, 0.15 + 0.3 * spread)  # middle of a leg's end
    low = 1.2 + 0.25 * garment.flare
    knee = 0.55 * length
    thick = 0.5 * (hip / 2 + end) if garment.cut.waist[0] > 0.3 else 0.5
    right = [
        (garment.waist - 0.1, 0.0),
        (hip, 0.8),
        (0.5 * foot + 0.5 * hip / 2 + thick, knee),
        (foot + end, length),
        (foot - end, length + 0.03),
        (max(0.01, 0.5 * foot + 0.5 * hip / 2 - thick), knee),
        (0.0, low),
    ]
    marks = [(140, [(-1.0, 0.12), (1.0, 0.12)]), (120, [(0.0, 0.1), (0.0, low)])]
    if garment.cut.front == "pockets":
        at = 0.3 if garment.round else knee
        marks += [(140, _square(side * 0.5, at, 0.15)) for side in (1, -1)]
    return [(_CLOTH, _mirrored(right))], marks


def _square(x: float, y: float, half: float) -> list[Point]:
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return [(x + half * right, y + half * down) for right, down in signs]
