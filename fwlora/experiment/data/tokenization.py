"""Tokens of a split: encoded once per tokenizer, text and settings, and kept on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.text import TextSplit
from fwlora.experiment.data.token_cache import cached_tokens
from fwlora.experiment.errors import UserError
from fwlora.experiment.paths import CACHE_DIR
from fwlora.experiment.settings.schema import DatasetSettings


def tokenize(split: TextSplit, tokenizer: Any, dataset: DatasetSettings) -> TokenizedSplit:
    """Tokenize every example, cut at ``max_length`` where truncation is on; the tokens are kept in ``.cache/tokens``.

    Args:
        split: the texts.
        tokenizer: of ``transformers``.
        dataset: names ``max_length`` in tokens and whether longer examples are cut.

    Raises:
        UserError: an example without tokens, or one that is longer than ``max_length`` while truncation is off.
    """
    key = _describe_tokenizer(tokenizer)
    if key is not None:
        key += [split.fingerprint, dataset.max_length, dataset.truncation]
    return cached_tokens(Path(CACHE_DIR) / "tokens", key, split.labels, lambda: encode_texts(split, tokenizer, dataset))


def encode_texts(split: TextSplit, tokenizer: Any, dataset: DatasetSettings) -> TokenizedSplit:
    """Tokenize every example, without a cache.

    Raises:
        UserError: see :func:`tokenize`.
    """
    encoded = tokenizer(*split.texts, truncation=dataset.truncation, max_length=dataset.max_length, padding=False)
    ids = encoded["input_ids"]
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
    _check_lengths(lengths, dataset)
    segments = None
    if "token_type_ids" in encoded:
        segments = np.concatenate([np.asarray(row, dtype=np.int8) for row in encoded["token_type_ids"]])
        segments = segments if segments.any() else None
    tokens = np.concatenate([np.asarray(row, dtype=np.int32) for row in ids])
    cut = _count_cut(encoded, split, tokenizer) if dataset.truncation else 0
    return TokenizedSplit(tokens, segments, np.concatenate([[0], np.cumsum(lengths)]), split.labels, cut)


def describe_cut(name: str, split: TokenizedSplit, dataset: DatasetSettings) -> str | None:
    """Describe the examples of a split that were cut; None where there are none."""
    if not split.cut:
        return None
    return (
        f"{split.cut:,} of {len(split):,} {name} examples are longer than run.dataset.max_length = "
        f"{dataset.max_length} tokens and were cut"
    )


def _count_cut(encoded: Any, split: TextSplit, tokenizer: Any) -> int:
    """Count the examples of which truncation left something out."""
    parts = getattr(encoded, "encodings", None)
    if parts is not None:
        return sum(bool(part.overflowing) for part in parts)
    whole = tokenizer(*split.texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(all_of) > len(kept) for all_of, kept in zip(whole, encoded["input_ids"], strict=True))


def _describe_tokenizer(tokenizer: Any) -> list[Any] | None:
    """List what a tokenizer's output depends on beside text and length; None for one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    padding_and_truncation_aside = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return [
        tokenizers.__version__, transformers.__version__, type(tokenizer).__name__,
        json.dumps(padding_and_truncation_aside), tokenizer.truncation_side, tokenizer.split_special_tokens,
        tokenizer.model_input_names,
    ]  # fmt: skip


def _check_lengths(lengths: np.ndarray, dataset: DatasetSettings) -> None:
    if lengths.min() == 0:
        raise UserError(
            f"data set {dataset.name!r}: {int((lengths == 0).sum())} texts have no token, the first is example "
            f"{int(lengths.argmin())} of its split; remove empty texts"
        )
    if lengths.max() > dataset.max_length and dataset.truncation:
        raise UserError(
            f"run.dataset.max_length = {dataset.max_length} leaves no room for text beside the special tokens; raise it"
        )
    if lengths.max() > dataset.max_length:
        raise UserError(
            f"run.dataset.truncation is false and example {int(lengths.argmax())} has {lengths.max()} tokens; "
            f"raise run.dataset.max_length above {dataset.max_length} or allow truncation"
        )
