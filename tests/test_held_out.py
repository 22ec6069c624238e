"""Which held-out rows are taken, and what their sources are called."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.held_out import MAX_SOURCES, in_turn, short_names, source_labels


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(0, 25))
def test_the_first_of_each_source_are_taken_as_evenly_as_they_go(labels: list[str], count: int) -> None:
    order = list(in_turn(labels))
    assert sorted(order) == list(range(len(labels)))
    taken = order[:count]
    of_each = {label: [number for number in taken if labels[number] == label] for label in set(labels)}
    for label, numbers in of_each.items():
        mine = [number for number, other in enumerate(labels) if other == label]
        assert numbers == mine[: len(numbers)], "in their order"
        if len(numbers) < len(mine):
            assert all(len(other) <= len(numbers) + 1 for other in of_each.values()), f"{label} had more to give"


def test_a_row_goes_by_its_data_source_and_else_by_where_it_lies() -> None:
    rows = [{"data_source": "openai/gsm8k"}, {"data_source": None}, {}, {}]
    names = ["/data/mixed.parquet"] * 2 + ["/data/b/test.jsonl", "some/dataset:main"]
    assert source_labels(rows, names) == ["openai/gsm8k", "mixed.parquet", "test.jsonl", "some/dataset:main"]


def test_sources_that_are_called_alike_are_told_apart_by_their_folders() -> None:
    names = ["/x/a/test.jsonl", "/x/b/test.jsonl", "/x/c.jsonl", "hub/test.jsonl"]
    assert list(short_names(names).values()) == ["a/test.jsonl", "b/test.jsonl", "c.jsonl", "hub/test.jsonl"]


def test_a_column_that_differs_in_every_row_names_no_sources() -> None:
    rows = [{"data_source": f"row {number}"} for number in range(MAX_SOURCES + 1)]
    assert set(source_labels(rows, ["/x/a.jsonl"] * len(rows))) == {"a.jsonl"}
    assert len(set(source_labels(rows[1:], ["/x/a.jsonl"] * MAX_SOURCES))) == MAX_SOURCES
