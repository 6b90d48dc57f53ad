"""How far the main thread of this process has come, by which `peers` tells who hangs.

Neither count grows while the process computes, waits or hangs.
"""


class _Count:
    alone = 0
    together = 0


def moved() -> None:
    """Notes that this process is at work at what others may not do, as preparing."""
    _Count.alone += 1


def moved_together() -> None:
    """Notes what every process does in the same order: who has fewer is behind."""
    _Count.together += 1


def moves() -> tuple[int, int]:
    """How often this process was seen at work alone, and together with all."""
    return _Count.alone, _Count.together
