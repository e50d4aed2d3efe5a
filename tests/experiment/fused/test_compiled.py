"""The compiled layers against the model itself in float64, and against the layers of torch's operations."""

from __future__ import annotations

import copy
import itertools
import stat

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adapters import find_adapter_pairs
from fwlora.experiment.engine.precision import DTYPES
from fwlora.experiment.fused import compiled
from fwlora.experiment.fused.compiled import Kernels, NoKernelsError, drop_threshold, kept_scale, load_kernels
from fwlora.experiment.fused.compiled_layer import CompiledLayer
from fwlora.experiment.fused.compiled_sketch import CompiledSketchProducts
from fwlora.experiment.fused.dropout import KeptMask
from fwlora.experiment.fused.families import known_families
from fwlora.experiment.fused.forward import FastClassifier, PlainClassifier, make_classifier
from fwlora.experiment.fused.layer import FusedLayer
from fwlora.experiment.methods.fw_lora import FwLoraMethod
from tests.helpers.fused_models import ALL, adapt, make_base

FAMILIES = [family.name for family in known_families()]
LABELS = torch.tensor([0, 1, 1, 0, 1])
SEEDS = range(6)
EVERYTHING = (*ALL, "attention.output.dense")


def make_inputs(width: int, padded: bool = True) -> dict[str, Tensor]:
    tokens = torch.randint(3, 60, (5, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padded:
        mask[::2, width - 3 :] = 0
        tokens[mask == 0] = 0
    return {"input_ids": tokens, **({"attention_mask": mask} if padded else {})}


def gradients(classifier: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradient of the loss by every trained parameter, in float64."""
    classifier.zero_grad()
    logits = classifier(**inputs)
    nn.functional.cross_entropy(logits, LABELS).backward()
    found = {name: p.grad.double() for name, p in classifier.named_parameters() if p.requires_grad}
    return {"logits": logits.detach().double(), **found}


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error in norm of any of them."""
    assert set(got) == set(expected) and len(got) > 3
    return max(float((got[name] - value).norm() / value.norm()) for name, value in expected.items())


def joint_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error in norm of all of them together."""
    assert set(got) == set(expected) and len(got) > 3
    difference = sum(float((got[name] - value).square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def make_compiled(model: nn.Module, precision: str = "fp32", **options) -> FastClassifier:
    kernels = load_kernels(DTYPES[precision])
    classifier = FastClassifier(model, find_adapter_pairs(model), precision, kernels=kernels, **options)
    assert classifier.remark is None and all(isinstance(layer, CompiledLayer) for layer in classifier.layers)
    return classifier


def exact_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients(PlainClassifier(model.double()).train(), inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "padded"), [(9, True), (16, False), (35, True)])
def test_logits_and_gradients_are_the_models_own(family, width, padded):
    model = adapt(make_base(family)).float()
    got = gradients(make_compiled(model), make_inputs(width, padded))
    assert largest_error(got, exact_gradients(model, make_inputs(width, padded))) < 5e-5


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [(("query", "value"), (2,)), (("key",), (4,)), (("attention.output.dense",), (2,)), (EVERYTHING, (1, 5, 9)),
     (ALL, (2, 0, 1)), (("output",), (8, 0))],
)  # fmt: skip
def test_any_matrices_and_ranks(targets, ranks):
    model = adapt(make_base(), targets, ranks=ranks).float()
    got = gradients(make_compiled(model), make_inputs(9))
    assert largest_error(got, exact_gradients(model, make_inputs(9))) < 5e-5


def test_heads_that_fill_no_vector_and_layers_without_biases():
    model = adapt(make_base(num_labels=3)).float()
    for layer in model.get_base_model().roberta.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads, attention.attention_head_size, attention.scaling = 4, 8, 8**-0.5
        layer.attention.self.key.base_layer.bias = layer.intermediate.dense.base_layer.bias = None
        layer.output.dense.base_layer.bias = None
    got = gradients(make_compiled(model), make_inputs(12))
    assert largest_error(got, exact_gradients(model, make_inputs(12))) < 5e-5


@pytest.mark.parametrize("width", [9, 35])
def test_with_equal_masks_dropout_is_that_of_torchs_operations(width, monkeypatch):
    """Both draw from one seed: the compiled layers hash it, the others are given the masks that this makes."""
    model = adapt(make_base(dropout=0.2), EVERYTHING, dropout=0.3, ranks=(2, 5)).float()
    model.get_base_model().roberta.encoder.layer[1].output.dropout.p = 0.4
    got = {}
    for precision in ("fp32", "bf16"):
        fast = make_compiled(model, precision).train()
        for seed in SEEDS:
            torch.manual_seed(seed)
            got[precision, seed] = gradients(fast, make_inputs(width))
    kernels = load_kernels(torch.float32)
    layers = itertools.cycle(fast.layers)
    mask = make_inputs(width)["attention_mask"]
    real = mask.flatten() == 1

    def draw_rows(seed, probability, columns, first_only):
        """The kernels see no padding; the others do, and may drop it as they like."""
        if first_only:
            return kernels.draw_kept(seed, probability, len(mask), columns)
        kept = torch.ones(mask.numel(), columns, dtype=torch.bool)
        kept[real] = kernels.draw_kept(seed, probability, int(real.sum()), columns)
        return kept

    def draw_weights(seed, probability, heads, first_only):
        queries = torch.ones(len(mask), dtype=torch.long) if first_only else mask.sum(1)
        drawn = kernels.draw_kept(seed, probability, heads * int(queries.sum()), width)
        kept = torch.ones(len(mask), heads, 1 if first_only else width, width, dtype=torch.bool)
        for example, rows in enumerate(drawn.split((heads * queries).tolist())):
            kept[example, :, : queries[example]] = rows.view(heads, -1, width)
        return kept

    def draw(self, batch, rows, device, bits):
        layer = next(layers)
        seeds = layer.draw(batch, rows, device, bits)
        columns = {name: group.d_in for name, group in layer.groups.items()} | {"hidden_0": 32, "hidden_1": 32}
        probabilities = dict.fromkeys(seeds, 0.3) | {"weights": 0.2}
        probabilities |= {f"hidden_{place}": p for place, p in enumerate(self.hidden_dropouts)}
        found = {}
        for name, own in seeds.items():
            parts = [
                draw_weights(int(seed), probabilities[name], layer.heads, layer.first_only)
                if name == "weights"
                else draw_rows(int(seed), probabilities[name], columns[name], layer.first_only and name != "all")
                for seed in own
            ]
            found[name] = KeptMask(torch.cat([part.flatten() for part in parts]), kept_scale(probabilities[name]))
        return found

    def enter(self, X, probability, bits):
        kept = draw_rows(int(bits.random_raw(1)[0]), probability, X.shape[1], False)
        return self._make_hidden(X * kept * kept_scale(probability))

    monkeypatch.setattr(FusedLayer, "draw", draw)
    monkeypatch.setattr(FusedLayer, "enter", enter)

    def reference(model: nn.Module, precision: str, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        classifier = FastClassifier(model, find_adapter_pairs(model), precision)
        return gradients(classifier.train(), make_inputs(width))

    rounded = {seed: reference(model, "bf16", seed) for seed in SEEDS}
    exact = {seed: reference(model.double(), "fp32", seed) for seed in SEEDS}
    assert max(joint_error(got["fp32", seed], exact[seed]) for seed in SEEDS) < 1e-4
    # Where torch's operations round, the kernels round at most as often; a single draw may go either way.
    ours, theirs = (
        np.mean([joint_error(found[seed], exact[seed]) for seed in SEEDS])
        for found in ({seed: got["bf16", seed] for seed in SEEDS}, rounded)
    )
    assert ours < 1.1 * theirs


def test_dropout_follows_torchs_seed_is_fresh_every_pass_and_off_in_evaluation():
    model = adapt(make_base(dropout=0.2), dropout=0.3).float()
    fast = make_compiled(model).train()
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append([fast(**make_inputs(9)).detach() for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1]) and not torch.equal(drawn[0][0], drawn[2][0])
    still = gradients(fast.eval(), make_inputs(9))
    assert largest_error(still, gradients(PlainClassifier(model.double()).eval(), make_inputs(9))) < 5e-5


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_right_probability_and_independently(rate):
    kernels = load_kernels(torch.float32)
    seeds = np.random.SFC64(7).random_raw(8)
    dropped = torch.stack([~kernels.draw_kept(int(seed), rate, 320, 640) for seed in seeds]).double()
    exact = drop_threshold(rate) / 2**16
    assert abs(exact - rate) < 2**-16 and kept_scale(rate) == 1 / (1 - exact)
    variance = exact * (1 - exact)
    assert abs(dropped.mean() - exact) < 5 * (variance / dropped.numel()) ** 0.5
    centred = dropped - exact
    # Neighbours, the two halves of one hash (16 columns apart), rows, and sites.
    shifts = [(..., slice(s, None), slice(None, -s)) for s in (1, 2, 16, 32, 64)]
    products = [centred[:, :, after] * centred[:, :, before] for _, after, before in shifts]
    products += [centred[:, 1:] * centred[:, :-1], centred[:, 7:] * centred[:, :-7], centred[1:] * centred[:-1]]
    for product in products:
        assert abs(product.mean()) < 5 * variance / product.numel() ** 0.5
    # Each place is dropped as often as any other; so is each pair of consecutive elements.
    for axes in ((0, 1), (0, 2)):
        means = dropped.mean(axes)
        count = dropped.numel() / means.numel()
        chi_square = float(((means - exact) ** 2 * count / variance).sum())
        assert abs(chi_square - means.numel()) < 5 * (2 * means.numel()) ** 0.5


def test_the_number_of_threads_changes_nothing(monkeypatch):
    model = adapt(make_base(dropout=0.2), EVERYTHING, dropout=0.3, ranks=(2, 5)).float()
    fast = make_compiled(model).train()
    real = Kernels.__call__
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(compiled.torch, "get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(3)
        found.append(gradients(fast, make_inputs(19)))
    assert Kernels.__call__ is real
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_gradients_are_measured_as_hooks_measure_them(estimator):
    values = []
    for path in ("plain", "compiled"):
        model = adapt(make_base(), EVERYTHING, ranks=(1, 2)).float()
        fw = FisherWeightedLora(model, FisherWeighting(estimator=estimator, warmup_steps=9, fisher_every=2, decay=0.5))
        classifier = PlainClassifier(model)
        if path == "compiled":
            classifier = make_compiled(model, find_estimator=lambda fw=fw: fw.pass_estimator)
        for width in (9, 12, 19, 8):
            gradients(classifier, make_inputs(width))
            gradients(classifier, make_inputs(width + 1))  # a second micro-batch
            fw.step()
        values.append(fw.fisher.values.clone())
    assert values[0].min() > 0
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=0)


def test_bf16_rounds_no_more_than_autocast_does():
    model = adapt(make_base()).float()
    fused = gradients(make_compiled(model, "bf16"), make_inputs(9))
    autocast = gradients(PlainClassifier(model, "bf16"), make_inputs(9))
    exact = exact_gradients(model, make_inputs(9))

    def error(found: dict[str, Tensor]) -> float:
        return float(np.median([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact]))

    assert 0.001 < error(fused) < 1.1 * error(autocast) < 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padding_changes_nothing_but_roundings_and_is_not_computed(precision):
    """A batch of unlike lengths is its examples alone; masks whose first token is hidden, or with holes, count too."""
    model = adapt(make_base(), EVERYTHING).float()
    fast = make_compiled(model, precision).eval()
    inputs = make_inputs(21, padded=False)
    lengths = [21, 3, 17, 1, 8]
    mask = (torch.arange(21) < torch.tensor(lengths)[:, None]).long()
    tokens = inputs["input_ids"] * mask
    rows = []
    layer = fast.layers[0]
    real_forward = layer.forward
    layer.forward = lambda X, *rest, **named: rows.append(len(X.residual)) or real_forward(X, *rest, **named)
    together = fast(input_ids=tokens, attention_mask=mask)
    assert rows == [sum(lengths)]
    alone = torch.cat([fast(input_ids=row[None, :n]) for row, n in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(together, alone, rtol=2e-5 if precision == "fp32" else 0.02, atol=1e-5)
    layer.forward = real_forward
    for holes in (mask * (torch.arange(21) != 2), mask.flip(1)):
        if precision == "fp32":
            exact = exact_gradients(copy.deepcopy(model), {"input_ids": tokens, "attention_mask": holes})
            got = gradients(fast, {"input_ids": tokens, "attention_mask": holes})
            assert largest_error(got, exact) < 1e-4


def test_infinities_reach_the_loss_in_either_type():
    model = adapt(make_base()).float()
    with torch.no_grad():
        find_adapter_pairs(model)[0].B.fill_(float("nan"))
    for precision in ("fp32", "bf16"):
        assert make_compiled(model, precision)(**make_inputs(9)).isnan().all()


def test_an_example_without_a_visible_token_stays_finite():
    inputs = make_inputs(9)
    inputs["attention_mask"][1] = 0
    fast = make_compiled(adapt(make_base()).float())
    assert all(value.isfinite().all() for value in gradients(fast, inputs).values())


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """A machine's empty cache."""
    load_kernels.cache_clear()
    monkeypatch.setenv("FWLORA_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    load_kernels.cache_clear()


def compile_and_use() -> Kernels:
    kernels = load_kernels(torch.float32)
    assert kernels.draw_kept(1, 0.0, 2, 32).all() and kernels.draw_kept(1, 0.5, 2, 32).any()
    return kernels


def test_a_second_process_finds_what_the_first_compiled(no_cache, monkeypatch):
    compile_and_use()
    assert len([*(no_cache / "kernels").iterdir()]) == 1
    load_kernels.cache_clear()
    monkeypatch.setattr(compiled, "_compile", lambda command: pytest.fail("compiled again"))
    compile_and_use()


def test_what_is_no_library_is_compiled_anew(no_cache, monkeypatch):
    compile_and_use()
    (library,) = (no_cache / "kernels").iterdir()
    load_kernels.cache_clear()
    # In another folder: the linker knows a loaded library by its path.
    monkeypatch.setenv("FWLORA_CACHE_DIR", str(no_cache / "other"))
    damaged = no_cache / "other" / "kernels" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"damaged")
    compile_and_use()
    assert damaged.stat().st_size == library.stat().st_size


def test_a_cache_that_cannot_be_written_does_no_harm(no_cache):
    no_cache.write_text("a file where the folder should be")
    assert compile_and_use() is load_kernels(torch.float32)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "no C compiler: neither CC nor cc, gcc, clang"),
        ("echo 'kernels.c:1: error: unknown instruction' >&2; exit 1", "kernels.c:1: error: unknown instruction"),
        ("exit 4", "exit code 4"),
        ("while [ $# -gt 0 ]; do [ $1 = -o ] && touch $2; shift; done", "cannot be loaded"),
    ],
)
def test_a_compiler_that_is_missing_or_fails_is_named(no_cache, script, reason, monkeypatch, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    if script is not None:
        (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "cc").chmod(stat.S_IRWXU)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder) + ("" if script is None else ":/usr/bin:/bin"))
    with pytest.raises(NoKernelsError, match=reason):
        load_kernels(torch.float32)


def test_there_are_no_kernels_for_other_types():
    with pytest.raises(NoKernelsError, match="float16"):
        load_kernels(torch.float16)


def test_what_the_kernels_do_not_take_is_left_to_torchs_operations_and_said():
    def remark_of(model: nn.Module, precision: str = "fp32") -> str:
        kernels = load_kernels(torch.float32)
        classifier, remark = make_classifier(
            model, find_adapter_pairs(model), precision, lambda: None, fast=True, kernels=kernels
        )
        assert all(isinstance(layer, FusedLayer) for layer in classifier.layers)
        gradients(classifier, make_inputs(9))
        return str(remark)

    assert "float32" in remark_of(adapt(make_base()))
    assert "they multiply in torch.float32" in remark_of(adapt(make_base()).float(), "bf16")
    odd = make_base()
    for layer in odd.roberta.encoder.layer:
        layer.intermediate.dense, layer.output.dense = nn.Linear(32, 40), nn.Linear(40, 32)
    assert "multiples of 16" in remark_of(adapt(odd).float())


def keep_results(products: CompiledSketchProducts, found: list) -> None:
    real = products.reduce

    def reduce(compressed, G):
        found.append(real(compressed, G))
        return found[-1]

    products.reduce = reduce  # type: ignore[method-assign]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_sketch_by_kernels_is_the_sketch_by_torchs_operations(precision, tolerance):
    values = []
    for by_kernels in (False, True):
        model = adapt(make_base(), EVERYTHING, ranks=(1, 2)).float()
        fw = FisherWeightedLora(model, FisherWeighting(estimator="sketch", warmup_steps=9, decay=0.5))
        method, products = FwLoraMethod(fw), []
        if by_kernels:
            method.use_kernels(load_kernels(DTYPES[precision]))
            assert isinstance(fw.sketch_products, CompiledSketchProducts)
            keep_results(fw.sketch_products, products)
        classifier = make_compiled(model, precision, find_estimator=lambda fw=fw: fw.pass_estimator)
        for width in (9, 19):
            gradients(classifier, make_inputs(width))
            method.after_backward(torch.optim.SGD(fw.pairs[0].module.parameters(), lr=0.0))
        values.append(fw.fisher.values.clone())
        assert len(products) == (2 * len(fw.pairs) if by_kernels else 0)
        assert all(product is not None and product.dtype == torch.float32 for product in products)
    torch.testing.assert_close(values[1], values[0], rtol=tolerance, atol=0)


def test_what_the_sketchs_kernels_do_not_take_is_left_to_torchs_operations():
    products = CompiledSketchProducts(load_kernels(torch.float32))
    for X, size in ((torch.randn(5, 24), 16), (torch.randn(5, 32), 5), (torch.randn(5, 32).double(), 16)):
        signs = torch.ones(X.shape[1], size, dtype=X.dtype)
        torch.testing.assert_close(products.compress(X, signs), X @ signs)
        assert products.reduce(X[:, :size].contiguous(), torch.randn(5, 24)) is None
