"""What lists of tokens begin with alike."""

from actors.prefixes import common, common_to_all, common_to_another


def test_what_lists_begin_with_alike() -> None:
    assert (common([1, 2, 3], [1, 2, 4, 5]), common([1, 2], [1, 2, 4]), common([], [1])) == (2, 2, 0)
    assert common_to_all([(1, 2, 3), (1, 2, 4, 5), (1, 2, 3, 9)]) == 2
    assert common_to_all([(1, 2)]) == 2 and common_to_all([(), (1,)]) == 0


def test_what_another_list_begins_with_too() -> None:
    assert common_to_another([[1, 2, 3], [5], [1, 2, 4, 4], [1, 2, 4], [1, 2, 4, 4]]) == [2, 0, 4, 3, 4]
    assert common_to_another([]) == [] and common_to_another([[1]]) == [0]
