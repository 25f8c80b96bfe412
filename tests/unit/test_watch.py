"""Reports of a hang: who is where, said in few lines."""

from megatron_omni.training.watch import Place, describe_places, ranges


def test_ranks_are_grouped_by_where_they_are_and_the_odd_one_comes_first() -> None:
    told = [Place(7, "communication", 61.0, 100.0) for _ in range(8)]
    told[3] = Place(7, "data", 62.0, 100.0)
    assert describe_places(told, now=101.0) == [
        "  step 7, data: rank 3 (there for 62 s)",
        "  step 7, communication: ranks 0-2, 4-7 (there for 61 s)",
    ]


def test_a_rank_that_says_nothing_any_more_is_silent() -> None:
    told = [Place(7, "backward", 5.0, 100.0), Place(7, "backward", 1.0, 60.0), None]
    assert describe_places(told, now=100.5) == [
        "  nowhere: rank 2 (never heard of)",
        "  step 7, backward: rank 1 (silent for 40 s)",
        "  step 7, backward: rank 0 (there for 5 s)",
    ]


def test_nothing_said_is_nothing_to_report() -> None:
    assert describe_places([None, None], now=0.0) == []


def test_ranges() -> None:
    assert ranges([5]) == "rank 5"
    assert ranges([9, 0, 1, 2, 7]) == "ranks 0-2, 7, 9"
