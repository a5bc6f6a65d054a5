from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMClientError

from cache_policies.vllm_plugin.versions import REFUSAL
from server.compression import (
    CompressorError,
    LLMLingua2,
    SelectiveContext,
    keep_words,
    split_words,
)
from server.compression.base import mean_by_word, tokens_by_word
from tests.server.test_compressed_requests import Slow, Words

if TYPE_CHECKING:
    from pathlib import Path


TEXT = "The sky is blue.\nKey 42 is here , yes.\n\nGrass grows where rain falls."


@given(st.text(alphabet="ab1 \n.,", max_size=60), st.floats(0.01, 1.0), st.data())
def test_the_rate_is_reached_and_order_and_forced_words_stay(
    text: str, rate: float, data: st.DataObject
) -> None:
    words = split_words(text)
    assert "".join(w.text for w in words) == text.rstrip()
    size = {"min_size": len(words), "max_size": len(words)}
    scores = data.draw(st.lists(st.floats(0, 1), **size))
    tokens = data.draw(st.lists(st.integers(1, 4), **size))
    kept = keep_words(words, scores, tokens, rate)
    mine = [w.text.strip() for w in words]
    left = iter(mine)
    assert all(word in left for word in kept.split())  # a subsequence
    forced = [w for w in mine if "1" in w or not w.strip(".,")]
    again = iter(kept.split())
    assert all(word in again for word in forced)
    cost = dict(zip(mine, tokens, strict=True))
    if len(cost) == len(mine):  # no word twice: what was kept can be counted
        spent = sum(cost[w] for w in kept.split() if w not in forced)
        room = rate * sum(tokens) - sum(cost[w] for w in forced)
        assert spent <= max(0.0, room) + 1e-9


def test_the_best_words_stay_and_line_breaks_with_them() -> None:
    words = split_words(TEXT)
    scores = [float(len(w.text.strip())) for w in words]
    ones = [1] * len(words)
    assert keep_words(words, scores, ones, 1.0) == TEXT
    assert keep_words(words, scores, ones, 0.5) == "blue.\n42 ,\n\nGrass grows where falls."
    assert "42" not in keep_words(words, scores, ones, 0.2, keep_digits=False)
    assert keep_words([], [], [], 0.5) == ""


def test_what_is_kept_keeps_its_indentation_and_a_word_too_long_is_passed_over() -> None:
    words = split_words("if x:\n    return y\n\n\tlongest_of_all z")
    ones = [1] * len(words)
    assert keep_words(words, ones, ones, 1.0) == "if x:\n    return y\n\n\tlongest_of_all z"
    costs = [1, 1, 1, 1, 50, 1]
    assert keep_words(words, [1, 1, 1, 1, 9, 1], costs, 0.1) == "if x:\n    return y\nz"


def test_scripts_without_spaces_are_split_into_characters() -> None:
    words = split_words("ab 中文。ok")
    assert [w.text for w in words] == ["ab", " 中", "文", "。", "ok"]
    assert keep_words(words, [5, 1, 4, 3, 2], [1] * 5, 0.4) == "ab文"


def test_tokens_of_a_word_are_those_that_end_in_it() -> None:
    words = split_words("ab c  def")
    assert tokens_by_word(words, [(0, 1), (1, 2), (2, 4), (4, 9), (9, 9)]) == [2, 1, 1]


def test_a_tokens_value_belongs_to_the_word_it_ends_in() -> None:
    words = split_words("ab c  def")
    spans = [(0, 0), (0, 1), (1, 2), (2, 4), (4, 9), (9, 9)]
    assert mean_by_word(words, spans, [9, 1, 3, 5, 7, 9]) == [2.0, 5.0, 7.0]
    assert mean_by_word(words, [(0, 2)], [4]) == [4.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer that reads 32 tokens, over characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("classifier")
    letters = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,?GKTV"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), letters, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(folder)
    return folder


def test_llmlingua_scores_are_mean_keep_probabilities_of_a_words_tokens(classifier: Path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    text = "the sky is blue"
    model = AutoModelForTokenClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
    keep = logits.softmax(-1)[1:-1, 1].tolist()  # a letter each, less [CLS] and [SEP]
    expected, at = [], 0
    for word in text.split():
        expected.append(sum(keep[at : at + len(word)]) / len(word))
        at += len(word)
    found = asyncio.run(LLMLingua2(str(classifier)).scores(text, split_words(text)))
    assert found == pytest.approx(expected, abs=1e-5)


def test_llmlingua_reads_long_texts_in_windows_that_end_between_words(classifier: Path) -> None:
    lingua = LLMLingua2(str(classifier))
    words = split_words("grass grows where rain falls and the sun is warm " * 10)
    text = "".join(w.text for w in words)
    found = asyncio.run(lingua.scores(text, words))
    assert len(found) == len(words)
    assert all(0 < s < 1 for s in found)  # every word got tokens
    # windows do not depend on each other: the first one alone scores the same
    (first, *_) = lingua._chunks(text, words)
    alone = asyncio.run(lingua.scores(text[: first[-1].end], first))
    assert found[: len(first)] == pytest.approx(alone, abs=1e-4)


def test_a_word_longer_than_the_window_does_not_stop_it(classifier: Path) -> None:
    text = "a " + "b" * 100 + " c"
    assert len(asyncio.run(LLMLingua2(str(classifier)).scores(text, split_words(text)))) == 3


def test_what_is_no_classifier_is_refused(three_classes: Path) -> None:
    with pytest.raises(CompressorError, match="--prompt-compressor /nowhere"):
        LLMLingua2("/nowhere")
    with pytest.raises(CompressorError, match="no classifier of two classes"):
        LLMLingua2(str(three_classes))


@pytest.fixture
def three_classes(classifier: Path, tmp_path: Path) -> Path:
    """The classifier with three classes."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForTokenClassification.from_pretrained(
        classifier, num_labels=3, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path / "three")
    return tmp_path / "three"


class Engine:
    """The log probability of a token is minus its place."""

    def __init__(self) -> None:
        config = SimpleNamespace(max_model_len=100)
        extra = {"cache_policy": "kivi-4bit"}
        self.vllm_config = SimpleNamespace(model_config=config, additional_config=extra)
        self.policy: str | None = None
        self.refusal: str | None = None
        self.fails: Exception | None = None

    async def generate(self, prompt: dict[str, Any], params: Any, _: str) -> Any:
        self.policy = params.extra_args["cache_policy"]
        if self.fails:
            raise self.fails
        ids = prompt["prompt_token_ids"]
        params = {REFUSAL: self.refusal} if self.refusal else None
        logs = [None, *({i: SimpleNamespace(logprob=-float(i))} for i in ids[1:])]
        yield SimpleNamespace(prompt_logprobs=logs, kv_transfer_params=params)


def test_selective_scores_are_the_self_information_under_the_whole_cache() -> None:
    engine = Engine()
    scores = asyncio.run(
        SelectiveContext(engine, Words()).scores("a b c d", split_words("a b c d"))
    )
    assert scores == [float("inf"), 1.0, 2.0, 3.0]
    assert engine.policy == "all"
    with pytest.raises(CompressorError, match="100 tokens, the model reads 100"):
        asyncio.run(SelectiveContext(engine, Words()).scores("a " * 100, split_words("a " * 100)))


@pytest.mark.parametrize("refused", ["by its output", "by an error"])
def test_what_the_scheduler_refuses_is_a_reason(refused: str) -> None:
    """A pool that cannot hold the whole text, as 0.32 and 0.33 say it."""
    engine = Engine()
    if refused == "by an error":
        engine.fails = VLLMClientError("too large")
    else:
        engine.refusal = "too large"
    with pytest.raises(CompressorError, match="selective: too large"):
        asyncio.run(SelectiveContext(engine, Words()).scores("a b", split_words("a b")))


def test_selective_takes_no_more_than_the_model_could_read() -> None:
    found = SelectiveContext(Engine(), Words())
    assert (found.most_letters, found.most_words) == (300, 400)


def test_who_leaves_does_not_let_two_texts_into_a_classifier(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, lingua = Slow(), LLMLingua2(str(classifier))
    monkeypatch.setattr(lingua, "_scores", lambda text, words: [float(len(slow(text))), *words])

    async def run() -> list[float]:
        left = asyncio.create_task(lingua.scores("a", []))
        await asyncio.sleep(0.01)
        left.cancel()
        return await lingua.scores("a", [])

    assert asyncio.run(run()) == [2.0]
    assert slow.most == 1
