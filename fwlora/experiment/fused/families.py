"""The model families that the fused forward pass covers: where the parts of each are, one entry per family.

All are post-norm encoders whose classifier reads the first token. A pre-norm encoder, such as ModernBERT, computes its
layers in another order and needs a :class:`fwlora.experiment.fused.layer.FusedLayer` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.camembert import modeling_camembert as camembert
from transformers.models.electra import modeling_electra as electra
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

_BERT_LINEAR_PATHS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


def embed_like_bert(encoder: Any, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Return embeddings before their dropout, shape (batch, width, d)."""
    training = encoder.embeddings.training
    encoder.embeddings.eval()
    try:
        hidden: Tensor = encoder.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    finally:
        encoder.embeddings.train(training)
    return hidden


def classify_pooled(model: Any, encoder: Any, first: Tensor) -> Tensor:
    """Return logits (batch, classes) of a pooler and a linear head, from the first token's output (batch, 1, d)."""
    logits: Tensor = model.classifier(model.dropout(encoder.pooler(first)))
    return logits


def classify_first(model: Any, encoder: Any, first: Tensor) -> Tensor:
    """Return logits (batch, classes) of a head that reads the first token itself, shape (batch, 1, d)."""
    logits: Tensor = model.classifier(first)
    return logits


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's models are; the defaults are BERT's.

    Paths of layers and embeddings start at the encoder, those of a layer's parts at the layer.

    Attributes:
        model_class: transformers' class; subclasses are not covered.
        layer_class: of every layer.
        head_class: of the module at ``head_path``.
        head_path: from the model, the module that reads the first token.
        head: (model, encoder, first token's output of shape (batch, 1, d)) -> logits, shape (batch, classes).
        embed: (encoder, token ids, token type ids) -> embeddings before their dropout, shape (batch, width, d).
        embeddings_path: the embeddings.
        embeddings_dropout_path: the dropout that follows them.
        stack_path: the module that runs the layers.
        layers_path: the list of layers.
        linear_paths: the six products of a layer: query, key, value, attention_output, intermediate, output.
        norm_paths: LayerNorm after the attention, and after the feed-forward part.
        attention_path: the module with ``num_attention_heads``, and ``dropout`` of attention probabilities.
        activation_path: the activation of the feed-forward part.
        dropout_paths: dropout before each of the two LayerNorms.
    """

    model_class: type[nn.Module]
    layer_class: type[nn.Module]
    head_class: type[nn.Module]
    head_path: str = "classifier"
    head: Callable[[Any, Any, Tensor], Tensor] = classify_first
    embed: Callable[[Any, Tensor, Tensor | None], Tensor] = embed_like_bert
    embeddings_path: str = "embeddings"
    embeddings_dropout_path: str = "embeddings.dropout"
    stack_path: str = "encoder"
    layers_path: str = "encoder.layer"
    linear_paths: Mapping[str, str] = field(default_factory=lambda: dict(_BERT_LINEAR_PATHS))
    norm_paths: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm")
    attention_path: str = "attention.self"
    activation_path: str = "intermediate.intermediate_act_fn"
    dropout_paths: tuple[str, str] = ("attention.output.dropout", "output.dropout")

    @property
    def name(self) -> str:
        """Transformers' ``model_type``."""
        model_class: Any = self.model_class
        return str(model_class.config_class.model_type)

    def layers(self, encoder: nn.Module) -> list[Any]:
        """Return the encoder's layers, first to last."""
        layers: Any = encoder.get_submodule(self.layers_path)
        return list(layers)


_FAMILIES: dict[type[nn.Module], Family] = {}


def register_family(family: Family) -> None:
    """Add a family.

    Raises:
        ValueError: another entry covers its model class.
    """
    if _FAMILIES.get(family.model_class, family) != family:
        raise ValueError(f"`model_class` {family.model_class.__name__} is registered already; register it once")
    _FAMILIES[family.model_class] = family


def known_families() -> list[Family]:
    """Return all registered families."""
    return list(_FAMILIES.values())


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a transformers model; None for one that is not covered."""
    return _FAMILIES.get(type(model))


for _family in (
    Family(bert.BertForSequenceClassification, bert.BertLayer, bert.BertPooler, "bert.pooler", classify_pooled),
    Family(roberta.RobertaForSequenceClassification, roberta.RobertaLayer, roberta.RobertaClassificationHead),
    Family(
        xlm_roberta.XLMRobertaForSequenceClassification,
        xlm_roberta.XLMRobertaLayer,
        xlm_roberta.XLMRobertaClassificationHead,
    ),
    Family(
        camembert.CamembertForSequenceClassification, camembert.CamembertLayer, camembert.CamembertClassificationHead
    ),
    Family(electra.ElectraForSequenceClassification, electra.ElectraLayer, electra.ElectraClassificationHead),
):
    register_family(_family)
