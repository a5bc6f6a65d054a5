"""Scores against values worked out by hand."""

from __future__ import annotations

import random
import re
import string
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.quality import METRICS
from loadtest.quality.words import answer_words, words

CASES = [
    # F1: words without case, punctuation, articles
    ("f1", "The cat sat.", ["a cat"], [], 2 / 3),
    ("f1", "paris", ["London", "Paris"], [], 1.0),
    ("f1", "", ["x"], [], 0.0),
    ("f1", "x x", ["x"], [], 2 / 3),
    ("f1", "Über Öl", ["über öl"], [], 1.0),
    ("f1", "the", ["the"], [], 0.0),  # nothing is left of either
    ("f1", "don\u2019t, “stop”", ["don't stop"], [], 1.0),
    ("f1", "Python、Java", ["Python, Java"], [], 1.0),
    # ... and of characters, where a script has no spaces: 2 * 2 / (3 + 2)
    ("f1", "北京市。", ["北京"], [], 0.8),
    ("f1", "東京タワー", ["東京タワーです"], [], 2 * 5 / 12),
    ("f1", "กรุงเทพ", ["กรุงเทพฯ"], [], 12 / 13),
    ("f1", "किताब", ["किताबें"], [], 0.0),
    ("f1", "서울 타워", ["서울"], [], 2 / 3),
    ("f1", "iPhone手机", ["手机 iphone"], [], 1.0),
    ("f1", "cafe\u0301", ["café"], [], 1.0),
    ("f1_first_line", "\n\nPassage: 55\nno", ["55"], [], 2 / 3),
    ("f1_first_line", " \nParis", ["Paris"], [], 1.0),
    ("f1_first_line", "\r\n\t\r\nParis\r\nno", ["Paris"], [], 1.0),
    ("f1_first_line", " \n \n", ["Paris"], [], 0.0),
    # ROUGE-L: longest common subsequence of words
    ("rouge_l", "the cat sat on mat", ["the cat lay on mat"], [], 0.8),
    ("rouge_l", "b a", ["a b"], [], 0.5),
    ("rouge_l", "", ["a"], [], 0.0),
    ("rouge_l", "кот сидит", ["кот сидит"], [], 1.0),
    ("rouge_l", "今天天气很好我们去公园散步", ["今天天气好我们去公园散步"], [], 24 / 25),
    ("rouge_l", "किताब", ["कातिब"], [], 0.0),
    ("rouge_l", "यह किताब है", ["यह कातिब है"], [], 2 / 3),
    ("rouge_l", "বই", ["বউ"], [], 0.0),
    ("rouge_l", "கதை", ["கதி"], [], 0.0),
    ("rouge_l", "كِتاب", ["كُتّاب"], [], 0.0),
    ("rouge_l", "ฉันรักเธอ", ["ฉันรักแม่"], [], 8 / 13),
    ("rouge_l", "カタカナ", ["カタナ"], [], 6 / 7),
    ("rouge_l", "ｶﾞｲﾄﾞ １２", ["ガイド 12"], [], 1.0),  # noqa: RUF001
    ("rouge_l", "오늘 날씨가 좋다", ["오늘 날씨 좋다"], [], 2 / 3),
    ("rouge_l", "\u1112\u1161\u11ab", ["한"], [], 1.0),  # letters of Hangul, and the syllable
    ("rouge_l", "vLLM在CPU上运行", ["vllm在GPU上运行"], [], 10 / 12),
    ("rouge_l", "Straße", ["STRASSE"], [], 1.0),
    ("rouge_l", "می\u200cخواهم", ["میخواهم"], [], 1.0),  # noqa: RUF001
    ("rouge_l", "snake_case", ["snake case"], [], 1.0),
    ("rouge_l_first_line", "a b\nc d e f", ["a b"], [], 1.0),
    ("rouge_l_first_line", " \t\na b\nc d", ["a b"], [], 1.0),
    # classification
    ("class_accuracy_first_line", "Individual\nDate", ["Individual"], ["Individual", "Date"], 1.0),
    ("class_accuracy_first_line", "Individual Date", ["Date"], ["Individual", "Date"], 0.5),
    ("class_accuracy_first_line", "Price", ["Date"], ["Price", "Date"], 0.0),
    # a class inside the right one's name is not counted
    ("class_accuracy_first_line", "Other number", ["Other number"], ["number", "Other number"], 1),
    ("class_accuracy_first_line", "", ["Date"], ["Date"], 0.0),
    ("class_accuracy_first_line", " \nDate", ["Date"], ["Date", "Price"], 1.0),
    # a list that lacks the right class, or no list
    ("class_accuracy_first_line", "Date", ["Date"], [], 1.0),
    ("class_accuracy_first_line", "Date Price", ["Date"], ["Price"], 0.5),
    ("class_accuracy_first_line", "Price", ["Date"], [], 0.0),
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
    ("edit_similarity", "  \n\r\nx = 1\r\ny", ["x = 1"], [], 1.0),
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


@pytest.fixture(scope="module")
def rouge_score() -> object:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    return scorer.RougeScorer(["rougeL"])


PROSE = st.text(st.sampled_from("ab cd.,'-_1\n"), max_size=60)


@given(answer=PROSE, reference=PROSE)
def test_rouge_l_of_latin_text_is_rouge_scores(
    rouge_score: object, answer: str, reference: str
) -> None:
    expected = rouge_score.score(reference, answer)["rougeL"].fmeasure  # type: ignore[attr-defined]
    assert METRICS["rouge_l"](answer, [reference], []) == pytest.approx(expected)


def squad_words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


@given(st.text(st.sampled_from(string.printable.strip() + " "), max_size=60))
def test_words_of_f1_are_squads_for_ascii(text: str) -> None:
    assert answer_words(text) == squad_words(text)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_has_a_score(a: str, b: str) -> None:
    for metric in ("f1", "rouge_l"):
        score = METRICS[metric](a, [b], [])
        assert 0 <= score <= 1
        assert score == pytest.approx(METRICS[metric](b, [a], []))
    assert METRICS["rouge_l"](a, [a], []) == float(bool(words(a)))
    assert METRICS["f1"](a, [a], []) == float(bool(answer_words(a)))


def test_rouge_l_of_long_texts_is_quick() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(800)]
    a, b = (" ".join(rng.choices(vocabulary, k=4000)) for _ in range(2))
    begin = time.process_time()
    assert 0 < METRICS["rouge_l"](a, [b], []) < 0.5
    assert time.process_time() - begin < 2.0  # dynamic programming in Python takes 13 s


def test_f1_counts_a_word_as_often_as_it_appears() -> None:
    assert Counter(answer_words("x X the x")) == {"x": 3}
