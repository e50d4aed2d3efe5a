"""Encoders with a classification head: loaded from where a run's settings name them, checked and counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fwlora.architectures import head_module_names
from fwlora.config import RankPlan
from fwlora.experiment.errors import UserError
from fwlora.experiment.methods import Method
from fwlora.experiment.modeling.pretrained import WEIGHT_FILES, fetching, resolve_pretrained
from fwlora.experiment.paths import CACHE_DIR
from fwlora.experiment.settings.schema import ModelSettings
from fwlora.experiment.tracking import metrics

logger = logging.getLogger(__name__)
# transformers makes up an empty tokenizer for a folder without any of these.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.*",
    "spm.*",
)
# Families with absolute positions, and how many of them come before the first token's.
POSITIONS_BEFORE_TEXT = {
    "bert": 0, "distilbert": 0, "electra": 0, "albert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2,
}  # fmt: skip
PRETRAINED = "run.model.pretrained_id"


@dataclass(frozen=True)
class AdaptedModel:
    """A model ready to train.

    Attributes:
        model: encoder, adapters and head, on the device.
        method: what the training loop calls.
        counts: numbers of parameters by their names in :mod:`fwlora.experiment.tracking.metrics`.
        encoder_fingerprint: hash of the encoder weights that training starts from.
    """

    model: nn.Module
    method: Method
    counts: dict[str, float]
    encoder_fingerprint: str


def load_tokenizer(settings: ModelSettings) -> Any:
    """Load the model's tokenizer.

    Raises:
        UserError: it cannot be fetched.
    """
    with fetching(settings.pretrained_id, PRETRAINED):
        source = resolve_pretrained(settings.pretrained_id, PRETRAINED)
        _require_file(Path(source), TOKENIZER_FILES, "a tokenizer")
        return AutoTokenizer.from_pretrained(
            source, revision=settings.revision, cache_dir=CACHE_DIR, trust_remote_code=False
        )


def make_weightless_model(settings: ModelSettings) -> nn.Module:
    """Make the model on the meta device, from its configuration alone.

    Raises:
        UserError: a configuration that cannot be fetched, or a folder without weights.
    """
    config = _load_config(settings)
    with fetching(settings.pretrained_id, PRETRAINED), torch.device("meta"):
        _require_file(Path(resolve_pretrained(settings.pretrained_id, PRETRAINED)), WEIGHT_FILES, "weights")
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def load_classifier(settings: ModelSettings, num_classes: int, pad_token_id: int) -> tuple[nn.Module, list[str]]:
    """Load the pretrained encoder in float32 under a new head, drawn from torch's current random state.

    Args:
        settings: the node ``run.model``.
        num_classes: outputs of the head.
        pad_token_id: token that batches are padded with; models that classify by the last token search for it.

    Returns:
        The model, and the names of the modules that make up its head.

    Raises:
        UserError: weights that cannot be fetched or do not fit the configuration.
    """
    config = _load_config(settings, num_labels=num_classes)
    with fetching(settings.pretrained_id, PRETRAINED):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            resolve_pretrained(settings.pretrained_id, PRETRAINED),
            config=config,
            revision=settings.revision,
            cache_dir=CACHE_DIR,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head; the encoder's are refused below
            trust_remote_code=False,
        )
    model.config.pad_token_id = pad_token_id
    where = f"{PRETRAINED} = {settings.pretrained_id!r}"
    misshapen = {key: f"{tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]}
    try:
        heads = head_module_names(model, sorted({*info["missing_keys"], *misshapen}))
    except ValueError as error:
        raise UserError(f"{where}: its weights do not fit {type(model).__name__}: {error}") from None
    broken = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise UserError(f"{where}: {len(broken)} of its weights are not finite, the first {broken[0]}; get them anew")
    for key, shapes in misshapen.items():
        logger.warning(f"{where}: {key} of its head has shape {shapes} and is drawn anew")
    return model, heads


def train_head_only(model: nn.Module, heads: Sequence[str]) -> None:
    """Freeze everything but the modules of the head."""
    model.requires_grad_(False)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)


def count_parameters(adapted: nn.Module, method: Method, plan: RankPlan, unadapted_parameters: int) -> dict[str, float]:
    """Count the parameters of an adapted model.

    Args:
        adapted: the model with its adapters.
        method: whose pairs hold the adapters.
        plan: of the ranks.
        unadapted_parameters: of the model before it was adapted; PEFT copies the head, so they cannot be counted later.

    Returns:
        Counts by their names in :mod:`fwlora.experiment.tracking.metrics`.
    """
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapters = sum(p.numel() for pair in method.pairs for p in (pair.A, pair.B, pair.E) if p is not None)
    return {
        metrics.PARAMS_ADAPTER: adapters,
        metrics.PARAMS_HEAD: trainable - adapters,
        metrics.PARAMS_TRAINABLE: trainable,
        metrics.PARAMS_ENCODER: plan.encoder_parameters,
        metrics.PARAMS_TOTAL: unadapted_parameters + adapters,
        metrics.BUDGET_PARAMETERS: plan.budget,
    }


def final_adapter_parameters(method: Method) -> int:
    """Count the adapter parameters that are in use; of AdaLoRA those of the triplets that were not pruned."""
    ranks = method.adapter_table().ranks
    return sum(
        rank * (pair.A.shape[1] + pair.B.shape[0] + (pair.E is not None))
        for rank, pair in zip(ranks, method.pairs, strict=True)
    )


def check_max_length(settings: ModelSettings, max_length: int) -> None:
    """Refuse texts longer than the encoder has positions for.

    Args:
        settings: the node ``run.model``.
        max_length: tokens of the longest text.

    Raises:
        UserError: ``max_length`` is above them.
    """
    config = _load_config(settings)
    if config.model_type not in POSITIONS_BEFORE_TEXT:
        return
    limit = config.max_position_embeddings - POSITIONS_BEFORE_TEXT[config.model_type]
    if max_length > limit:
        raise UserError(
            f"run.dataset.max_length = {max_length}: {settings.pretrained_id} has positions for {limit} tokens; "
            f"use at most {limit}"
        )


def _require_file(folder: Path, patterns: tuple[str, ...], what: str) -> None:
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise OSError(f"{folder} holds no file of {what}: none of {', '.join(patterns)}")


def _load_config(settings: ModelSettings, **options: Any) -> Any:
    with fetching(settings.pretrained_id, PRETRAINED):
        source = resolve_pretrained(settings.pretrained_id, PRETRAINED)
        return AutoConfig.from_pretrained(
            source, revision=settings.revision, cache_dir=CACHE_DIR, trust_remote_code=False, **options
        )
