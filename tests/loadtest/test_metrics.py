"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest

from loadtest.quality import METRICS

CASES = [
    # F1: words without case, punctuation, articles
    ("f1", "The cat sat.", ["a cat"], [], 2 / 3),
    ("f1", "paris", ["London", "Paris"], [], 1.0),
    ("f1", "", ["x"], [], 0.0),
    ("f1", "x x", ["x"], [], 2 / 3),
    ("f1", "Über Öl", ["über öl"], [], 1.0),
    ("f1", "the", ["the"], [], 0.0),  # nothing is left of either
    ("f1_first_line", "\n\nPassage: 55\nno", ["55"], [], 2 / 3),
    # ROUGE-L: longest common subsequence of words
    ("rouge_l", "the cat sat on mat", ["the cat lay on mat"], [], 0.8),
    ("rouge_l", "b a", ["a b"], [], 0.5),
    ("rouge_l", "", ["a"], [], 0.0),
    ("rouge_l", "кот сидит", ["кот сидит"], [], 1.0),
    ("rouge_l_first_line", "a b\nc d e f", ["a b"], [], 1.0),
    # classification
    ("class_accuracy_first_line", "Individual\nDate", ["Individual"], ["Individual", "Date"], 1.0),
    ("class_accuracy_first_line", "Individual Date", ["Date"], ["Individual", "Date"], 0.5),
    ("class_accuracy_first_line", "Price", ["Date"], ["Price", "Date"], 0.0),
    # a class inside the right one's name is not counted
    ("class_accuracy_first_line", "Other number", ["Other number"], ["number", "Other number"], 1),
    ("class_accuracy_first_line", "", ["Date"], ["Date"], 0.0),
    # retrieval, count
    ("retrieval", "Paragraph 19", ["Paragraph 19"], [], 1.0),
    ("retrieval", "19 or 3", ["Paragraph 19"], [], 0.5),
    ("retrieval", "none", ["Paragraph 19"], [], 0.0),
    ("retrieval", "119", ["Paragraph 19"], [], 0.0),
    ("count", "46", ["46"], [], 1.0),
    ("count", "4 6 46 46", ["46"], [], 0.5),
    ("count", "", ["46"], [], 0.0),
    # edit similarity of the first line of code: 2 * common / (a + b)
    ("edit_similarity", "```python\n# note\nabcd\nzz", ["abxd"], [], 0.75),
    ("edit_similarity", "\n", ["abc"], [], 0.0),
    ("edit_similarity", "x = 1", ["x = 1"], [], 1.0),
    ("edit_similarity", "naïve", ["naïve"], [], 1.0),
    # keys
    ("exact_key", " 1234567.", ["1234567"], [], 1.0),
    ("exact_key", "1234 567", ["1234567"], [], 0.0),
    ("exact_key", "ключ 12", ["12"], [], 1.0),
    ("partial_key", "1234 567", ["1234567"], [], 4 / 7),
    ("partial_key", "", ["12"], [], 0.0),
    ("partial_key", "0000", ["1111"], [], 0.0),
    ("partial_key", "99991111", ["1111"], [], 1.0),
    # RULER
    ("all_strings", "ABC and def", ["abc", "DEF", "ghi", "x"], [], 0.5),
    ("all_strings", "", ["a"], [], 0.0),
    ("all_strings", "x", [], [], 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "references", "classes", "expected"), CASES)
def test_score(
    metric: str, answer: str, references: list[str], classes: list[str], expected: float
) -> None:
    assert METRICS[metric](answer, references, classes) == pytest.approx(expected)


def test_every_metric_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(METRICS)
