"""Names beside dots: close dots share a column of names, none on top of another."""

from collections.abc import Sequence

GAP = 16.0  # between the base lines of two names
NEAR = 0.08  # dots within this share of the width share a column
LETTER = 8.0  # the width of a letter, in the widest of common fonts
SPACE = 16.0  # between dots and names

Place = tuple[float, float, str]  # x, y and anchor
Box = tuple[float, float, float, float]


def columns(
    names: Sequence[str],
    spots: Sequence[tuple[float, float]],
    left: float,
    right: float,
) -> list[Place]:
    """Return where each dot's name goes: beside it, on the side with more room.

    Args:
        names: of the dots.
        spots: their pixels.
        left: the smallest pixel of the chart.
        right: the largest.
    """
    found: list[Place] = [(0.0, 0.0, "")] * len(names)
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in spots]

    def cost(index: int, edge: float, side: str) -> int:
        box = _box(names[index], (edge, spots[index][1] + 4, side))
        hits = sum(_meet(box, other) for other in taken)
        return hits + 100 * (box[0] < left or box[2] > right)

    for group in _groups([x for x, _ in spots], NEAR * (right - left)):
        xs = [spots[i][0] for i in group]
        edges = {"start": max(xs) + SPACE, "end": min(xs) - SPACE}
        sides: dict[str, list[int]] = {side: [] for side in edges}
        for i in sorted(group, key=lambda i: spots[i][1]):
            costs = {side: cost(i, edge, side) for side, edge in edges.items()}
            sides[min(costs, key=costs.__getitem__)].append(i)
        for side, members in sides.items():
            heights = apart([spots[i][1] for i in members], GAP)
            for i, y in zip(members, heights, strict=True):
                found[i] = (edges[side], y + 4, side)
                taken.append(_box(names[i], found[i]))
    return found


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Move ascending numbers as little as possible until all are ``gap`` apart.

    ``y_i − i·gap`` must ascend: the least squares answer is isotonic regression, which
    pools neighbours that clash into their mean.

    Example:
        >>> apart([0.0, 1.0, 50.0], 10.0)
        [-4.5, 5.5, 50.0]
    """
    pools: list[list[float]] = []
    for index, value in enumerate(values):
        pools.append([value - index * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [_mean(pool) for pool in pools for _ in pool]
    return [value + index * gap for index, value in enumerate(flat)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _groups(values: Sequence[float], reach: float) -> list[list[int]]:
    """Return indices in groups of values that are near their smallest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        if groups and values[index] - values[groups[-1][0]] <= reach:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _box(name: str, place: Place) -> Box:
    x, y, anchor = place
    length = LETTER * len(name)
    start = x if anchor == "start" else x - length
    return start, y - 11, start + length, y + 3


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
