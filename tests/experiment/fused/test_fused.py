"""The fused path against the model itself: logits, every gradient, with and without dropout, in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adalora import attach_adalora, plan_adalora
from fwlora.adapters import find_adapter_pairs, resize_adapter
from fwlora.architectures import find_target_matrices
from fwlora.experiment.fused import layer as fused_layer
from fwlora.experiment.fused.dropout import draw_dropped
from fwlora.experiment.fused.families import Family, known_families, register_family
from fwlora.experiment.fused.forward import FastClassifier, PlainClassifier, make_classifier
from fwlora.experiment.fused.read_model import UnsupportedModelError
from tests.helpers.fused_models import ALL, HEADS, HIDDEN, LAYERS, adapt, make_base

FAMILIES = [family.name for family in known_families()]


def make_inputs(width: int, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (5, width), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        mask[::2, width - 3 :] = 0
        tokens[mask == 0] = 0
    return {"input_ids": tokens, **({"attention_mask": mask} if padded else {})}


LABELS = torch.tensor([0, 1, 1, 0, 1])


def gradients(classifier: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradient of the loss by every trained parameter."""
    classifier.zero_grad()
    logits = classifier(**inputs)
    nn.functional.cross_entropy(logits, LABELS).backward()
    found = {
        name: parameter.grad.clone() for name, parameter in classifier.named_parameters() if parameter.requires_grad
    }
    return {"logits": logits.detach(), **found}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected) and len(got) > 3
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert value.abs().max() > 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "padded"), [(9, True), (9, False), (19, True)])
def test_logits_and_gradients_are_the_models_own(family, width, padded):
    model = adapt(make_base(family))
    fast, plain = FastClassifier(model, find_adapter_pairs(model)), PlainClassifier(model)
    inputs = make_inputs(width, padded)
    assert_equal(gradients(fast, inputs), gradients(plain, inputs))
    with torch.no_grad():
        for classifier in (fast.eval(), plain.eval()):
            inputs = {**inputs, "token_type_ids": inputs["input_ids"] % 2 if family == "bert" else None}
            classifier.logits = classifier(**inputs)
    torch.testing.assert_close(fast.logits, plain.logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [
        (("query", "value"), (2,)), (("value", "key"), (4,)), (("attention.output.dense",), (2,)),
        ((*ALL, "attention.output.dense"), (1, 2, 5)), (ALL, (2, 0, 1)), (("output",), (3, 0)),
    ],
)  # fmt: skip
def test_any_matrices_and_mixed_ranks(targets, ranks):
    model = adapt(make_base(), targets, ranks=ranks)
    fast, plain = FastClassifier(model, find_adapter_pairs(model)), PlainClassifier(model)
    assert_equal(gradients(fast, make_inputs(9)), gradients(plain, make_inputs(9)))


def test_a_head_alone():
    model = make_base().double().requires_grad_(False)
    model.classifier.requires_grad_(True)
    assert_equal(
        gradients(FastClassifier(model, []), make_inputs(9)), gradients(PlainClassifier(model), make_inputs(9))
    )


def test_adalora_with_its_singular_values():
    base = make_base()
    matrices = find_target_matrices(base, ALL)
    plan = plan_adalora(matrices, 3 * sum(matrix.cost for matrix in matrices), 3.0, 1.5)
    schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.0}
    model = attach_adalora(
        base, matrices, plan, scaling=2.0, dropout=0.0, total_steps=9, schedule=schedule, head_modules=["classifier"]
    ).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    pairs = find_adapter_pairs(model)
    assert all(pair.E is not None for pair in pairs)
    fast, plain = FastClassifier(model, pairs), PlainClassifier(model.base_model.model)
    got, expected = gradients(fast, make_inputs(9)), gradients(plain, make_inputs(9))
    assert_equal({n.removeprefix("model.base_model."): v for n, v in got.items()}, expected)


class Replay:
    """Records what the fused path drops, and has torch's dropout do the same, in the order the model asks for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int, width: int) -> None:
        self.masks: list[Tensor] = []
        self.batch, self.width, self.layer = batch, width, 0
        monkeypatch.setattr(fused_layer, "draw_dropped", self.draw)
        monkeypatch.setattr(nn.functional, "dropout", self.apply)

    def draw(self, requests, device, bits):
        return (self.draw_embedding if set(requests) == {"X"} else self.draw_layer)(requests, device, bits)

    def draw_embedding(self, requests, device, bits):
        drawn = draw_dropped(requests, device, bits)
        self.masks = [self.mask(drawn["X"], requests["X"][0], drawn["X"].scale).view(self.batch, self.width, -1)]
        self.layer = 0
        return drawn

    def draw_layer(self, requests, device, bits):
        drawn = draw_dropped(requests, device, bits)
        self.layer += 1
        last = self.layer == LAYERS
        masks = {name: self.mask(d, requests[name][0], d.scale) for name, d in drawn.items()}
        key_value = masks["all"].view(-1, self.batch, self.width, HIDDEN)
        heads = [self.whole(masks["wanted"], last), *key_value] if last else list(key_value)
        weights = masks["weights"].view(self.batch, HEADS, -1, self.width)
        if last:
            weights = torch.cat([weights, torch.ones(self.batch, HEADS, self.width - 1, self.width)], dim=2)
        rest = [self.whole(masks[name], last) for name in ("hidden_0", "intermediate", "output", "hidden_1")]
        self.masks += [*heads, weights, *rest]
        return drawn

    def mask(self, dropped, size: int, scale: float) -> Tensor:
        return dropped.zero_(torch.full((size,), scale, dtype=torch.float64))

    def whole(self, mask: Tensor, last: bool) -> Tensor:
        """For every token; in the last layer the fused path draws for the first token alone."""
        if not last:
            return mask.view(self.batch, self.width, -1)
        first = mask.view(self.batch, 1, -1)
        return torch.cat([first, torch.ones(self.batch, self.width - 1, first.shape[-1])], dim=1)

    def apply(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        mask = self.masks.pop(0)
        assert mask.shape == x.shape
        return x * mask


@pytest.mark.parametrize("width", [9, 19])
def test_with_equal_masks_dropout_computes_what_the_models_own_does(width, monkeypatch):
    model = adapt(make_base(dropout=0.2), dropout=0.3)
    model.get_base_model().roberta.encoder.layer[1].output.dropout.p = 0.4
    replay = Replay(monkeypatch, 5, width)
    fast, plain = FastClassifier(model, find_adapter_pairs(model)).train(), PlainClassifier(model).train()
    got = gradients(fast, make_inputs(width))
    assert len(replay.masks) == 1 + 8 * LAYERS
    assert_equal(got, gradients(plain, make_inputs(width)))
    assert replay.masks == []
    fast.eval()
    still = gradients(fast, make_inputs(width))
    assert_equal(still, gradients(plain.eval(), make_inputs(width)))
    assert (still["logits"] - got["logits"]).abs().max() > 1e-3


def test_dropout_follows_torchs_seed_and_is_fresh_every_pass():
    model = adapt(make_base(dropout=0.2), dropout=0.3)
    fast = FastClassifier(model, find_adapter_pairs(model)).train()
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append([fast(**make_inputs(9)).detach() for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1]) and not torch.equal(drawn[0][0], drawn[2][0])


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_gradients_are_measured_as_hooks_measure_them(estimator):
    values = []
    for path in ("plain", "fast"):
        model = adapt(make_base(), (*ALL, "attention.output.dense"), ranks=(1, 2))
        fw = FisherWeightedLora(model, FisherWeighting(estimator=estimator, warmup_steps=9, fisher_every=2, decay=0.5))
        pairs, find_estimator = fw.pairs, lambda fw=fw: fw.pass_estimator
        fast = FastClassifier(model, pairs, find_estimator=find_estimator) if path != "plain" else None
        classifier = fast or PlainClassifier(model)
        for width in (9, 12, 19, 8):
            gradients(classifier, make_inputs(width))
            gradients(classifier, make_inputs(width + 1))  # a second micro-batch
            fw.step()
        values.append(fw.fisher.values.clone())
    assert values[0].min() > 0
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_right_probability_and_independently(rate):
    size, repeats = 200_000, 8
    bits = np.random.SFC64(5)
    requests = {"a": (size, rate), "b": (size, rate), "never": (7, 0.0)}
    drops, gaps = [], []
    for _ in range(repeats):
        drawn = draw_dropped(requests, torch.device("cpu"), bits)
        assert set(drawn) == {"a", "b"} and drawn["a"].scale == pytest.approx(1 / (1 - rate))
        first, second = (drawn[name].zero_(torch.ones(size)) == 0 for name in ("a", "b"))
        drops.append(torch.stack([first, second]).double())
        gaps.append(np.diff(np.flatnonzero(first.numpy())))
    dropped = torch.stack(drops)
    count = dropped.numel()
    error = (rate * (1 - rate) / count) ** 0.5
    assert abs(dropped.mean() - rate) < 5 * error
    centred = dropped - rate
    scale = rate * (1 - rate)
    for product in (
        centred[..., 1:] * centred[..., :-1], centred[..., 7:] * centred[..., :-7], centred[:, 0] * centred[:, 1],
        centred[1:] * centred[:-1],
    ):  # fmt: skip
        assert abs(product.mean()) < 5 * scale / product.numel() ** 0.5
    # Gaps between dropped elements are geometric: compare the whole distribution.
    gap = np.concatenate(gaps)
    for limit in (1, 2, 5, 20):
        expected = 1 - (1 - rate) ** limit
        assert abs((gap <= limit).mean() - expected) < 5 * (expected * (1 - expected) / len(gap)) ** 0.5 + 1e-12
    # Ends of the tensor are dropped as often as its middle.
    many = [
        draw_dropped({"a": (3, rate)}, torch.device("cpu"), bits)["a"].zero_(torch.ones(3)) == 0 for _ in range(4000)
    ]
    ends = torch.stack(many).double().mean(0)
    assert (ends - rate).abs().max() < 5 * (scale / 4000) ** 0.5


def fallback_reason(model: nn.Module, pairs=None) -> str | None:
    classifier, remark = make_classifier(
        model, find_adapter_pairs(model) if pairs is None else pairs, "fp32", lambda: None, fast=True
    )
    assert isinstance(classifier, PlainClassifier)
    return remark


def test_what_is_not_covered_falls_back_and_says_why():
    model = adapt(make_base(), use_dora=True)
    assert "a variant of LoRA" in fallback_reason(model, [])
    model = adapt(make_base(), lora_bias=True)
    assert "a bias in the adapter" in fallback_reason(model)
    model = adapt(make_base())
    pairs = find_adapter_pairs(model)
    model.merge_adapter()
    assert "a merged adapter" in fallback_reason(model, pairs)
    model = adapt(make_base(hidden_act="relu"))
    assert "the activation 'relu'" in fallback_reason(model)
    model = adapt(make_base(dropout=1.0))
    assert "a dropout probability of 1" in fallback_reason(model)
    model = adapt(make_base())
    model.get_base_model().roberta.encoder.layer[1].output.dense.base_layer.weight.requires_grad_(True)
    assert "base weights that are trained" in fallback_reason(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model("distilbert", vocab_size=60, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
        other = AutoModelForSequenceClassification.from_config(config)
    assert "DistilBertForSequenceClassification" in fallback_reason(other, [])
    with pytest.raises(UnsupportedModelError):
        FastClassifier(other, [])


class MeanHead(nn.Module):
    """Reads all tokens: the first alone would not do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.mean(1))


def change_activation(model: nn.Module) -> None:
    model.roberta.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()


def change_normalization(model: nn.Module) -> None:
    model.roberta.encoder.layer[1].output.LayerNorm = nn.RMSNorm(HIDDEN)


def change_head(model: nn.Module) -> None:
    model.classifier = MeanHead()


def hook_a_layer(model: nn.Module) -> None:
    model.roberta.encoder.layer[0].register_forward_hook(lambda module, args, output: 2 * output)


def hook_a_product(model: nn.Module) -> None:
    model.roberta.encoder.layer[0].attention.output.dense.register_forward_pre_hook(lambda module, args: args)


def replace_a_layer(model: nn.Module) -> None:
    model.roberta.encoder.layer[0] = type("Mine", (type(model.roberta.encoder.layer[0]),), {})(model.config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_activation, "activation"), (change_normalization, "normalization"), (change_head, "a head of its own"),
        (hook_a_layer, "hooks"), (hook_a_product, "hooks"), (replace_a_layer, "layers of its own"),
        (lambda model: model.gradient_checkpointing_enable(), "gradient checkpointing"),
    ],
)  # fmt: skip
def test_modules_that_were_changed_are_not_covered(change, reason):
    base = make_base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(base)
        config = LoraConfig(r=2, target_modules=["query", "value"])
        assert reason in fallback_reason(get_peft_model(base, config))


def test_learnt_prompts_and_a_class_of_the_same_name_are_not_covered():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompted = get_peft_model(make_base(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    assert "learnt prompts" in fallback_reason(prompted, [])
    base = make_base()
    base.__class__ = type("RobertaForSequenceClassification", (type(base),), {})
    assert "RobertaForSequenceClassification" in fallback_reason(base, [])
    base = make_base("bert")
    base.bert.pooler = None
    assert "a head of its own" in fallback_reason(base, [])


def test_an_example_without_a_visible_token_stays_finite():
    model = adapt(make_base())
    inputs = make_inputs(9)
    inputs["attention_mask"][1] = 0
    fast, plain = FastClassifier(model, find_adapter_pairs(model)), PlainClassifier(model)
    assert_equal(gradients(fast, inputs), gradients(plain, inputs))


def test_a_model_that_has_run_and_one_that_lost_an_adapter_are_covered():
    model = adapt(make_base())
    pairs = find_adapter_pairs(model)
    expected = gradients(PlainClassifier(model), make_inputs(9))
    assert_equal(gradients(FastClassifier(model, pairs), make_inputs(9)), expected)
    resize_adapter(pairs[1], pairs[1].A[:0], pairs[1].B[:, :0])
    plain = gradients_of_present(PlainClassifier(model))
    for classifier in (FastClassifier(model, pairs), PlainClassifier(model)):
        assert_equal(gradients_of_present(classifier), plain)


def gradients_of_present(classifier: nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have elements left."""
    classifier.zero_grad()
    logits = classifier(**make_inputs(9))
    nn.functional.cross_entropy(logits, LABELS).backward()
    trained = [(n, p) for n, p in classifier.named_parameters() if p.requires_grad and p.numel()]
    return {"logits": logits.detach(), **{name: parameter.grad.clone() for name, parameter in trained}}


def test_fast_false_is_the_model_itself_without_a_word():
    model = adapt(make_base())
    classifier, remark = make_classifier(model, find_adapter_pairs(model), "fp32", lambda: None, fast=False)
    assert isinstance(classifier, PlainClassifier) and remark is None


def test_bf16_rounds_as_autocast_does():
    model = adapt(make_base()).float()
    pairs = find_adapter_pairs(model)
    exact = gradients(FastClassifier(model, pairs), make_inputs(9))
    fused = gradients(FastClassifier(model, pairs, "bf16"), make_inputs(9))
    autocast = gradients(PlainClassifier(model, "bf16"), make_inputs(9))
    assert all(value.dtype == torch.float32 for value in fused.values())

    def error(found: dict[str, Tensor]) -> float:
        return float(np.median([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact]))

    assert 0.001 < error(fused) < 1.2 * error(autocast) < 0.5


def test_a_pass_is_differentiated_once():
    model = adapt(make_base())
    loss = FastClassifier(model, find_adapter_pairs(model))(**make_inputs(9)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_families_are_registered_once_by_the_class_of_their_models():
    first = known_families()[0]
    assert FAMILIES == ["bert", "roberta", "xlm-roberta", "camembert", "electra"]
    register_family(first)
    assert len(known_families()) == len(FAMILIES)
    with pytest.raises(ValueError, match="`model_class` BertForSequenceClassification is registered already"):
        register_family(Family(first.model_class, first.layer_class, first.layer_class))
