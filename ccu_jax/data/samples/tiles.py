"""Draws tiles that look like land seen from above; no real place is behind them."""

import numpy as np

from ccu_jax.data.samples.drawing import grid, jpeg, smooth, soft, turned

_Colour = tuple[float, float, float]
_GREY = 0.35  # of the tiles: by a sensor that hardly sees colours


def draw(
    rng: np.random.Generator, cover: str, beside: str, share: float, winter: bool
) -> bytes:
    """One tile as a JPEG, 64 to 80 pixels a side.

    Args:
        rng: Layout, light, haze and clouds; the same state gives the same bytes.
        cover: What most of the tile shows, a key of COVERS.
        beside: What the rest shows.
        share: How much of it, roughly, in [0, 0.5).
        winter: Whether the light is low and the plants are brown.
    """
    size = int(rng.integers(64, 81))
    image = COVERS[cover](rng, size)
    if share:
        x, _ = turned(*grid(size), rng.uniform(0, 2 * np.pi))
        edge = x + 0.25 * smooth(rng, size, 5)
        mask = soft(np.quantile(edge, 1 - share) - edge, 0.05)[..., None]
        image = image + mask * (COVERS[beside](rng, size) - image)
    grey = image.mean(axis=2, keepdims=True)
    if winter:
        image = 0.6 * image + 0.4 * (grey * np.array([1.05, 1.0, 0.92]))
    if rng.random() < _GREY:
        image = 0.15 * image + 0.85 * grey
    # A field of light and the land's own rise and fall: no two tiles are as one.
    image = image * (1 + 0.14 * smooth(rng, size, 3)[..., None])
    return _seen(rng, image, size)


def _seen(rng: np.random.Generator, image: np.ndarray, size: int) -> bytes:
    """What sensor and air make of it."""
    image = image * rng.uniform(0.7, 1.25) * rng.normal(1, 0.12, 3)
    haze = rng.uniform(0, 0.5) if rng.random() < 0.6 else 0.0
    image = image + haze * (np.array([0.75, 0.8, 0.85]) - image)
    if rng.random() < 0.4:
        cloud = soft(0.9 - smooth(rng, size, 4), 0.8)[..., None] * rng.uniform(0.5, 0.9)
        image = image + cloud * (0.95 - image)
    image = image + rng.normal(0, rng.uniform(0.005, 0.04), image.shape)
    return jpeg(image, int(rng.integers(75, 92)))


def _tinted(field: np.ndarray, low: _Colour, high: _Colour) -> np.ndarray:
    """Values in [0, 1] as colours between two."""
    low_, high_ = np.array(low), np.array(high)
    return low_ + field.clip(0, 1)[..., None] * (high_ - low_)


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    along, _ = turned(*grid(size), rng.uniform(0, np.pi))
    waves = np.sin(rng.uniform(14, 30) * along + 1.5 * smooth(rng, size, 4))
    depth = 0.45 + 0.2 * smooth(rng, size, 2) + 0.05 * waves
    return _tinted(depth, (0.03, 0.12, 0.24), (0.18, 0.42, 0.48))


def _forest(rng: np.random.Generator, size: int) -> np.ndarray:
    crowns = 0.5 + 0.22 * smooth(rng, size, size // 4) + 0.16 * smooth(rng, size, 6)
    return _tinted(crowns, (0.04, 0.14, 0.06), (0.24, 0.38, 0.16))


def _farmland(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = turned(*grid(size), rng.uniform(0, np.pi))
    columns = np.digitize(x, np.sort(rng.uniform(-1.2, 1.2, rng.integers(2, 5))))
    rows = np.digitize(y, np.sort(rng.uniform(-1.2, 1.2, rng.integers(2, 5))))
    fields = np.array(
        [(0.30, 0.42, 0.16), (0.55, 0.52, 0.26), (0.46, 0.36, 0.24), (0.40, 0.50, 0.24)]
    )
    which = rng.integers(0, len(fields), 36)[columns * 6 + rows]
    furrows = np.sin(40 * np.where(which % 2, x, y)) * 0.04
    return fields[which] + (furrows + 0.03 * smooth(rng, size, 10))[..., None]


def _residential(rng: np.random.Generator, size: int) -> np.ndarray:
    return _built(rng, size, cells=rng.uniform(5, 8), street=0.26, roofs=_ROOFS)


def _industrial(rng: np.random.Generator, size: int) -> np.ndarray:
    return _built(rng, size, cells=rng.uniform(1.6, 3.2), street=0.16, roofs=_HALLS)


_ROOFS = (
    (0.62, 0.34, 0.26),
    (0.50, 0.42, 0.36),
    (0.58, 0.56, 0.54),
    (0.30, 0.38, 0.22),
)
_HALLS = (
    (0.80, 0.80, 0.78),
    (0.60, 0.63, 0.66),
    (0.46, 0.46, 0.46),
    (0.36, 0.42, 0.50),
)


def _built(rng, size: int, cells: float, street: float, roofs) -> np.ndarray:
    """Blocks of roofs between streets."""
    x, y = turned(*grid(size), rng.uniform(0, np.pi))
    x, y = (x + 3) * cells / 2, (y + 3) * cells / 2
    which = rng.integers(0, len(roofs), (40, 40))[x.astype(int), y.astype(int)]
    image = np.array(roofs)[which]
    ground = (x % 1 < street) | (y % 1 < street)
    image[ground] = (0.40, 0.40, 0.38)
    return image + 0.05 * smooth(rng, size, size // 3)[..., None]


def _desert(rng: np.random.Generator, size: int) -> np.ndarray:
    along, _ = turned(*grid(size), rng.uniform(0, np.pi))
    dunes = np.sin(rng.uniform(6, 16) * along + 2.2 * smooth(rng, size, 4))
    sand = 0.55 + 0.2 * dunes + 0.12 * smooth(rng, size, 3)
    return _tinted(sand, (0.50, 0.36, 0.22), (0.86, 0.74, 0.54))


def _snow(rng: np.random.Generator, size: int) -> np.ndarray:
    ridges = 1 - np.abs(smooth(rng, size, rng.integers(4, 9)))
    bare = soft(1.0 - smooth(rng, size, 5), 0.3)[..., None]
    white = _tinted(0.35 + 0.5 * ridges, (0.50, 0.58, 0.68), (0.96, 0.97, 0.99))
    return white + bare * (np.array([0.34, 0.32, 0.30]) - white)


def _wetland(rng: np.random.Generator, size: int) -> np.ndarray:
    reeds = 0.5 + 0.2 * smooth(rng, size, 12) + 0.15 * smooth(rng, size, 4)
    land = _tinted(reeds, (0.18, 0.22, 0.10), (0.44, 0.44, 0.26))
    creeks = soft(np.abs(smooth(rng, size, rng.integers(4, 7))) - 0.3, 0.25)[..., None]
    return land + creeks * (np.array([0.10, 0.18, 0.22]) - land)


COVERS = {
    "desert": _desert,
    "farmland": _farmland,
    "forest": _forest,
    "industrial": _industrial,
    "residential": _residential,
    "snow": _snow,
    "water": _water,
    "wetland": _wetland,
}
