"""The table of an evaluation in the terminal."""

from __future__ import annotations

from typing import Any

from launch.scores import score_table


def row(source: str, function: str, share: float | None, **metrics: float) -> dict[str, Any]:
    if share is None:
        return (
            {"source": source, "function": function, "prompts": 0, "completions": 0}
            | dict.fromkeys(("value", "low", "high"))
            | {"metrics": {}}
        )
    counts = {"source": source, "function": function, "prompts": 7, "completions": 28, "value": share}
    return counts | {"low": 0.081, "high": 0.455, "metrics": {"mean@4": share} | metrics}


def test_each_source_and_function_has_a_line_with_counts_and_interval() -> None:
    scores = [row("", "strict", 0.5), row("a", "strict", 0.25, **{"pass@4": 0.75}), row("b\x1b[2J", "strict", None)]
    assert score_table({"scores": scores}) == [
        "source    function  prompts  completions  value  mean@4        95% interval  pass@4",
        "all       strict          7           28  0.500   50.0%       8.1% to 45.5%",
        "a         strict          7           28  0.250   25.0%       8.1% to 45.5%   75.0%",
        r"b\x1b[2J  strict          0            0                 nothing was scored",
    ]


def test_of_one_source_the_sum_over_all_is_left_out() -> None:
    lines = score_table({"scores": [row("", "strict", 0.5), row("a", "strict", 0.5)]})
    assert [line.split()[0] for line in lines] == ["source", "a"]
