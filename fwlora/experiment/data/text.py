"""Labelled text: the splits of a task before they are tokenized, and the parts that are drawn from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from fwlora.experiment.errors import UserError


@dataclass(frozen=True)
class TextSplit:
    """One split as text.

    Attributes:
        texts: one or two columns of n strings each: the first and the second text of every example.
        labels: int64 classes or float32 numbers, shape (n,).
        fingerprint: hash of texts and labels in order.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    fingerprint: str

    def select(self, indices: np.ndarray) -> TextSplit:
        """Return the examples at ``indices``, in that order."""
        return make_split(tuple([column[i] for i in indices] for column in self.texts), self.labels[indices])


@dataclass(frozen=True)
class TaskData:
    """A task with both of its splits.

    Attributes:
        task: name of the task, such as ``cola``.
        label_names: name of every class, in class order; empty where labels are numbers.
        task_metric: name of the task metric that runs are compared by.
        train: training examples.
        evaluation: examples that every epoch is evaluated on.
    """

    task: str
    label_names: tuple[str, ...]
    task_metric: str
    train: TextSplit
    evaluation: TextSplit

    def limit(self, train_examples: int | None, eval_examples: int | None, seed: int) -> TaskData:
        """Draw a random part of both splits; None keeps a split whole."""
        return replace(
            self,
            train=draw_subset(self.train, train_examples, seed),
            evaluation=draw_subset(self.evaluation, eval_examples, seed),
        )


def make_split(texts: tuple[list[str], ...], labels: np.ndarray) -> TextSplit:
    """Make a split and its fingerprint.

    Args:
        texts: columns of n strings.
        labels: classes or numbers, shape (n,).
    """
    digest = hashlib.sha256()
    for row in zip(*texts, labels.tolist(), strict=True):
        digest.update(repr(row).encode())
    return TextSplit(texts, labels, digest.hexdigest()[:16])


def draw_subset(split: TextSplit, examples: int | None, seed: int) -> TextSplit:
    """Draw ``examples`` at random and keep their order; None, or a number not below the split's, keeps all."""
    if examples is None or examples >= len(split.labels):
        return split
    chosen = np.random.default_rng(seed).permutation(len(split.labels))[:examples]
    return split.select(np.sort(chosen))


def split_heldout(split: TextSplit, fraction: float, seed: int) -> tuple[TextSplit, TextSplit]:
    """Hold out a part of a split, stratified by class; it depends on ``seed`` alone, not on the training seed.

    Returns:
        The rest and the held-out part.

    Raises:
        UserError: too few examples of some class to be in both parts.
    """
    from sklearn.model_selection import train_test_split  # takes a second, which runs without a search need not wait

    indices = np.arange(len(split.labels))
    classes = split.labels if split.labels.dtype.kind == "i" else None
    try:
        rest, heldout = train_test_split(indices, test_size=fraction, random_state=seed, stratify=classes)
    except ValueError as error:
        raise UserError(
            f"run.optuna.heldout_fraction = {fraction} of {len(indices)} training examples cannot be held out: {error}"
        ) from None
    return split.select(np.sort(rest)), split.select(np.sort(heldout))
