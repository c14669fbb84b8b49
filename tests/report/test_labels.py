"""Names beside dots: apart from each other, and as near as that allows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxq.report.labels import GAP, LETTER, apart, columns

HEIGHTS = st.lists(st.floats(0, 400), min_size=1, max_size=8).map(sorted)


@given(HEIGHTS)
def test_apart_is_the_nearest_that_keeps_the_gap(values):
    found = np.array(apart(values, GAP))
    assert (np.diff(found) > GAP - 1e-9).all()
    cost = ((found - values) ** 2).sum()
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0):  # no other arrangement is nearer
        steps = np.diff(found, prepend=found[0]) + abs(rng.normal(0, scale, len(found)))
        steps[0] = found[0] + rng.normal(0, scale)
        other = np.cumsum(steps)
        assert ((other - values) ** 2).sum() >= cost - 1e-6


def test_a_name_stands_beside_its_dot():
    ((x, y, anchor),) = columns(["w4a16"], [(100.0, 50.0)], 0, 800)
    assert (x > 107, y, anchor) == (True, 54.0, "start")
    ((x, _, anchor),) = columns(["w4a16"], [(790.0, 50.0)], 0, 800)
    assert (x < 783, anchor) == (True, "end")


@given(
    st.lists(
        st.tuples(st.sampled_from([100.0, 130.0, 400.0]), st.floats(50, 350)),
        min_size=1,
        max_size=6,
    )
)
def test_names_of_a_column_do_not_touch(spots):
    names = [f"recipe-{i}" for i in range(len(spots))]
    found = columns(names, spots, 0, 800)
    wide = LETTER * len(names[0])
    boxes = []
    for x, y, anchor in found:
        start = x if anchor == "start" else x - wide
        boxes.append((start, y))
        assert start >= 0
        assert start + wide <= 800
    for i, (x, y) in enumerate(boxes):
        for other, height in boxes[:i]:
            if x == other:
                assert abs(y - height) >= GAP - 1e-9


def test_a_name_moves_to_the_other_side_of_another_dot():
    spots = [(200.0, 100.0), (290.0, 102.0)]
    first, second = columns(["w3a16-autoround", "nf4"], spots, 0, 800)
    assert first[2] == "end"
    assert second[2] == "start"
