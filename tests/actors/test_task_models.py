"""What the requests of a row share."""

from actors.lmeval.models import Family, families, parts


def test_requests_of_a_row_share_their_beginning() -> None:
    tokens = [[1, 2, 3, 4, 5], [7, 7, 1], [1, 2, 3, 4, 6, 6], [7, 8, 1], [9]]
    # Row a has a context of 3 tokens, the last of which gives the first log-prob; b's differ from the second on; c is alone.
    got = families(tokens, [3, 2, 3, 2, 0], ["a", "b", "a", "b", "c"])
    assert got == [Family((0, 2), 2), Family((1, 3), 1), Family((4,), 0)]
    assert families([[1, 2, 3], [1, 2, 3]], [1, 1], [0, 0]) == [Family((0, 1), 0)]
    assert families([[1, 2, 3], [1, 2, 3]], [2, 2], [0, 1]) == [Family((0,), 1), Family((1,), 1)]


def test_parts_fit_into_the_cache() -> None:
    row = [Family((number,), 0) for number in range(5)]
    assert parts(row, [3, 3, 9, 1, 5], 6) == [row[:2], row[2:3], row[3:]]
    assert parts([], [], 6) == []
