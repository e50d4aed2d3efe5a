"""The method on small random models of every family that it promises to work on."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn

from fwlora import FisherWeightedLora, FisherWeighting, FwLoraConfig
from fwlora.adapters import find_adapter_pairs
from tests.helpers.family_models import (
    FAMILIES,
    make_base,
    make_inputs,
)
from tests.helpers.small_models import squared_gradient_norms, trainable

# Layers' parts per family, so that a projection lost by a rename would be noticed.
MATRICES = {"modernbert": 6, "gpt2": 6, "gpt2-classifier": 6, "llama": 12, "t5": 26}


def make_model(family: str, *, double: bool = True, **options) -> nn.Module:
    """Adapters on all projections with both factors random: every gradient is alive."""
    base = make_base(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = get_peft_model(base, FwLoraConfig.for_model(base, budget_percent=12.0, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for pair in find_adapter_pairs(model):
            pair.B.copy_(0.02 * torch.randn(pair.B.shape, generator=generator))
    return model.double() if double else model


def loss_on(family: str):
    return lambda model: model(**make_inputs(family)).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_gradients_are_autograds_and_the_estimators_follow(family):
    model = make_model(family, estimator="exact", fisher_every=1, warmup_steps=1, decay=0.5)
    assert len(find_adapter_pairs(model)) == MATRICES.get(family, 10)
    expected = squared_gradient_norms(model, loss_on(family))
    assert (expected > 0).all()
    found = {}
    for estimator, size in (("exact", 1), ("sketch", 4096), ("adapter", 1)):
        fw = FisherWeightedLora(
            model,
            FisherWeighting(estimator=estimator, fisher_every=1, warmup_steps=9, decay=0.5, sketch_size=size),
        )
        model.zero_grad()
        loss_on(family)(model).backward()
        fw.step()
        found[estimator] = 2 * fw.fisher.values
        fw.close()
    torch.testing.assert_close(found["exact"], expected, rtol=1e-9, atol=1e-20)
    # 4,096 signs leave a relative error of at most sqrt(2 / 4096) = 2.2 %.
    torch.testing.assert_close(found["sketch"], expected, rtol=0.1, atol=0)
    assert torch.isfinite(found["adapter"]).all() and (found["adapter"] > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_shrinks_saves_loads_and_merges(family, tmp_path):
    model = make_model(family, double=False, warmup_steps=2, fisher_every=1, strength=0.3)
    fw = FisherWeightedLora(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for step in range(4):
        loss_on(family)(model).backward()
        if step == 3:
            before = [pair.B.grad.clone() for pair in fw.pairs]
            expected = torch.autograd.grad(fw.penalty(), [pair.B for pair in fw.pairs])
        fw.step()
        if step == 3:
            added = [pair.B.grad - old for pair, old in zip(fw.pairs, before, strict=True)]
            torch.testing.assert_close(added, list(expected), rtol=1e-3, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
    assert len(fw.importance()) == len(fw.pairs) and sum(fw.importance().values()) == pytest.approx(1, rel=1e-5)
    model.eval()
    inputs = make_inputs(family)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        loaded = PeftModel.from_pretrained(make_base(family), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["roberta", "llama", "t5", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_model(family, reentrant):
    model = make_model(family, estimator="exact", fisher_every=1, decay=0.0)
    expected = squared_gradient_norms(model, loss_on(family))
    fw = FisherWeightedLora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames it to activation checkpointing
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss_on(family)(model).backward()
    fw.step()
    torch.testing.assert_close(fw.fisher.values, expected, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("family", ["roberta", "modernbert", "llama", "t5"])
def test_autocast(family):
    model = make_model(family, double=False)
    expected = squared_gradient_norms(copy.deepcopy(model).double(), loss_on(family))
    for estimator, tolerance in (("exact", 0.1), ("sketch", 0.2)):
        options = FisherWeighting(estimator=estimator, fisher_every=1, decay=0.0, sketch_size=1024)
        fw = FisherWeightedLora(model, options)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_on(family)(model)
        loss.backward()
        fw.step()
        torch.testing.assert_close(fw.fisher.values.double(), expected, rtol=tolerance, atol=0)
        fw.close()


# Dynamo looks at .grad of every tensor that it is given after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("estimator", "attach_first"), [("exact", False), ("sketch", True), ("adapter", True)])
def test_compiled_models(attach_first, estimator):
    options = {"estimator": estimator, "fisher_every": 2, "warmup_steps": 4, "strength": 0.3, "decay": 0.5}
    results, graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model("roberta", **options)
        if compiled and not attach_first:
            model = torch.compile(model, backend="aot_eager")
        fw = FisherWeightedLora(model)
        if compiled and attach_first:
            model = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for _ in range(6):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            loss_on("roberta")(model).backward()
            fw.step()
            optimizer.step()
            optimizer.zero_grad()
        results.append((fw.fisher.values, [pair.B.detach() for pair in fw.pairs], list(fw.importance())))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-9, atol=1e-15)
    assert results[0][2] == results[1][2]
    # Measuring breaks the graph; a step without it is compiled once, and stays after the hooks are gone.
    new = [after - before for before, after in itertools.pairwise(graphs[6:])]
    assert new[0] >= 1 and new[-1] == 0
    if Version(torch.__version__) >= Version("2.11"):  # older ones compile more graphs before they settle
        assert new[1] == 1 and new[2:] == [0, 0, 0]
    torch._dynamo.reset()
