"""What evaluation needs of a run beside the settings: ``config["resolved"]``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from fwlora.experiment.json_types import JsonMapping, JsonObject


@dataclass(frozen=True)
class RunFacts:
    """Facts of one run, as recorded under ``config["resolved"]``.

    Attributes:
        task: of the data set; None where it has no name.
        label_names: one per class, in order of the class numbers; empty where labels are numbers.
        primary_metric: name of the evaluation metric that is compared, such as ``eval_accuracy``.
        precision: ``bf16`` or ``fp32``.
        product_times_ms: of the model's products by precision, which that was chosen by; None without a choice.
        kernels: ``compiled`` where compiled kernels were at hand, which take most models, else ``torch``.
        train_examples: number of training examples.
        eval_examples: number of evaluation examples.
        train_fingerprint: hash of the training split's texts and labels.
        eval_fingerprint: hash of the evaluation split's texts and labels.
        train_examples_cut: training examples that were longer than ``max_length`` and lost their rest.
        eval_examples_cut: evaluation examples that did.
        command: that made the run.
        environment: commit, versions, hardware; see :mod:`fwlora.experiment.tracking.environment`.
    """

    task: str | None = None
    label_names: tuple[str, ...] = ()
    primary_metric: str | None = None
    precision: str | None = None
    product_times_ms: JsonMapping | None = None
    kernels: str | None = None
    train_examples: int | None = None
    eval_examples: int | None = None
    train_fingerprint: str | None = None
    eval_fingerprint: str | None = None
    train_examples_cut: int | None = None
    eval_examples_cut: int | None = None
    command: str | None = None
    environment: JsonMapping = field(default_factory=dict)

    def as_record(self) -> JsonObject:
        """Return plain values for the run's record."""
        return {**asdict(self), "label_names": list(self.label_names)}

    @classmethod
    def from_record(cls, recorded: JsonMapping | None) -> RunFacts:
        """Read what was recorded; unknown entries are ignored, missing ones keep their defaults."""
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in (recorded or {}).items() if name in known and value is not None}
        if "label_names" in values:
            values["label_names"] = tuple(str(name) for name in values["label_names"])
        return cls(**values)
