"""Tokens of a split: limits, pairs, and what the cache's key depends on."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from fwlora.experiment.data.text import make_split
from fwlora.experiment.data.tokenization import describe_cut, tokenize
from fwlora.experiment.errors import UserError
from fwlora.experiment.modeling.pretrained import resolve_pretrained
from tests.helpers.dataset_settings import make_dataset


def test_a_pair_becomes_one_sequence_with_segments(minilm):
    split = make_split((["a cat", "dogs"], ["no", "yes it is"]), np.array([0, 1]))
    tokenizer = AutoTokenizer.from_pretrained(resolve_pretrained(minilm, "model"))
    tokens = tokenize(split, tokenizer, make_dataset("x"))
    single = tokenizer("a cat", "no")
    assert tokens.tokens[: tokens.offsets[1]].tolist() == single["input_ids"]
    assert tokens.segments[: tokens.offsets[1]].tolist() == single["token_type_ids"] and 1 in single["token_type_ids"]


def test_max_length_is_a_cap(tiny_roberta):
    split = make_split((["the cat sees the dog again and again"],), np.array([0]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    assert tokenize(split, tokenizer, make_dataset("x", max_length=5)).lengths.tolist() == [5]
    with pytest.raises(UserError, match="truncation is false and example 0 has"):
        tokenize(split, tokenizer, make_dataset("x", max_length=5, truncation=False))


def test_tokens_on_disk_are_those_of_this_tokenizer_and_these_settings(tiny_roberta, tmp_path):
    split = make_split((["the cat sees the dog", "no one knows"],), np.array([0, 1]))
    for side in ("right", "left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_roberta, truncation_side=side)
        for length in (6, 4, 6):
            got = tokenize(split, tokenizer, make_dataset("x", max_length=length))
            expected = tokenizer(*split.texts, truncation=True, max_length=length)["input_ids"]
            assert got.tokens.tolist() == [token for row in expected for token in row]
    assert len(list((tmp_path / ".cache" / "tokens").iterdir())) == 4


def test_texts_without_a_token_are_refused(tiny_roberta):
    class Bare:
        """A tokenizer that adds no special tokens, and whose settings cannot be told."""

        def __call__(self, texts, **options):
            return {"input_ids": [[7] * len(text.split()) for text in texts]}

    split = make_split((["a b", "", ""],), np.array([0, 1, 0]))
    with pytest.raises(UserError, match="2 texts have no token, the first is example 1"):
        tokenize(split, Bare(), make_dataset("x"))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_examples_that_are_cut_are_counted(tiny_roberta, fast, side):
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta, truncation_side=side)

    class WithoutEncodings:
        """A tokenizer written in Python gives ids alone."""

        def __call__(self, *texts, **options):
            return {"input_ids": tokenizer(*texts, **options)["input_ids"]}

    texts = ["the cat sees the dog", "no one knows", "the cat", "the cat sees the dog again"]
    whole = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    split = make_split((texts,), np.array([0, 1, 0, 1]))
    for length in range(min(whole), max(whole) + 2):
        dataset = make_dataset("x", max_length=length)
        got = tokenize(split, tokenizer if fast else WithoutEncodings(), dataset)
        assert got.cut == sum(each > length for each in whole)
        again = tokenize(split, tokenizer if fast else WithoutEncodings(), dataset)
        assert again.cut == got.cut, "the cache keeps the count"
        told = describe_cut("training", got, dataset)
        if got.cut:
            longer = f"{got.cut} of 4 training examples are longer than run.dataset.max_length = {length} tokens"
            assert told == f"{longer} and were cut"
        else:
            assert told is None
    pair = make_split((texts, texts), np.array([0, 1, 0, 1]))
    longest = max(len(ids) for ids in tokenizer(texts, texts)["input_ids"])
    assert tokenize(pair, tokenizer, make_dataset("x", max_length=longest - 1)).cut >= 1
