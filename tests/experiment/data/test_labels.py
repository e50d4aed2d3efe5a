"""Label columns become classes, or a reason why they cannot."""

from __future__ import annotations

import numpy as np
import pytest

from fwlora.experiment.data.labels import AS_NUMBERS, LabelEncoder, describe_other_than_numbers, encode_numbers


@pytest.mark.parametrize(
    ("values", "class_names", "names", "encoded"),
    [
        ([0, 2, 1], (), ("0", "1", "2"), [0, 2, 1]),
        (["0", "2", "1"], (), ("0", "1", "2"), [0, 2, 1]),
        (["10", "9", "10"], (), ("9", "10"), [1, 0, 1]),
        (["no", "yes", "no"], (), ("no", "yes"), [0, 1, 0]),
        (["007", "7"], (), None, None),
        (["NA", "EU", "null", "None", "n/a"], (), ("EU", "NA", "None", "n/a", "null"), [1, 0, 4, 2, 3]),
        ([1, 0], ["unacceptable", "acceptable"], ("unacceptable", "acceptable"), [1, 0]),
        ([True, False], (), ("False", "True"), [1, 0]),
        ([1.0, 3.0], (), ("1", "3"), [0, 1]),
        ([4, 1, 3, 2, 1], (), ("1", "2", "3", "4"), [3, 0, 2, 1, 0]),
        ([0, 4, 0], (), ("0", "4"), [0, 1, 0]),
        ([-1, 1, -1], (), ("-1", "1"), [0, 1, 0]),
        ([0, 10**12], (), ("0", "1000000000000"), [0, 1]),
    ],
)
def test_the_classes_are_the_values_present(values, class_names, names, encoded):
    encoder = LabelEncoder.fit(values, class_names)
    if names is None:
        assert "mixes integers and text" in str(encoder.problem)
        return
    assert (encoder.names, encoder.problem) == (names, None)
    assert encoder.encode(values, class_names).tolist() == encoded
    assert encoder.describe_unknown(values, class_names) is None


@pytest.mark.parametrize(
    ("values", "class_names", "remark"),
    [
        ([0, 1, 2], (), None),
        (["a", "b"], (), None),
        ([4, 1], (), "holds the integers 1, 4: class 0 is 1, class 1 is 4, and so on"),
        ([0, 2], ("a", "b", "c"), "has no example of the class 'b', which the data set names"),
        ([0, 1], ("a", "b"), None),
        (["0.5", "2.0"], (), f"holds the numbers 0.5, 2.0, read as 2 classes; {AS_NUMBERS}"),
        (["1.0", "0.0"], (), None),
        (["neg", "pos", "Neg "], (), "holds the classes 'Neg ' and 'neg', which differ in case or in spaces alone"),
    ],
)
def test_what_a_reader_may_not_expect_is_remarked(values, class_names, remark):
    assert LabelEncoder.fit(values, class_names).remark == remark


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.5], f"holds neither integers nor text, but [0.5]; labels are classes; {AS_NUMBERS}"),
        (["0.5", "3"], f"mixes integers and text, such as 3, '0.5'; {AS_NUMBERS}"),
        ([], "holds neither integers nor text, but []; labels are classes"),
        ([0, "a"], "mixes integers and text, such as 0, 'a'; use one of them"),
        ([0, 0], "has 1 class (0); 2 to 256 classes can be learnt"),
        (list(range(300)), "has 300 classes; 2 to 256 classes can be learnt"),
        ([-1, -1], "has 1 class (-1); 2 to 256 classes can be learnt; -1 marks the hidden labels of a GLUE test split"),
    ],
)
def test_classes_that_cannot_be_learnt_have_a_reason(values, expected):
    assert LabelEncoder.fit(values).problem == expected


def test_an_index_beyond_the_names_of_the_data_set_is_refused():
    problem = LabelEncoder.fit([0, 1, -1], ("a", "b")).problem
    assert problem == "holds -1, which is none of its classes a, b; -1 marks the hidden labels of a GLUE test split"


@pytest.mark.parametrize(
    ("values", "class_names", "chosen", "names", "encoded"),
    [
        ([1, 2, 1], (), ["bad", "good"], ("bad", "good"), [0, 1, 0]),
        (["yes", "no"], (), ["yes", "no"], ("yes", "no"), [0, 1]),
        ([1, 0], ("no", "yes"), ["yes", "no"], ("yes", "no"), [0, 1]),
    ],
)
def test_names_and_order_can_be_chosen(values, class_names, chosen, names, encoded):
    encoder = LabelEncoder.fit(values, class_names, chosen)
    assert encoder.names == names and encoder.encode(values, class_names).tolist() == encoded


@pytest.mark.parametrize(("values", "chosen"), [([0, 1, 2], ["a", "b"]), (["x", "y"], ["x", "z"])])
def test_chosen_names_that_do_not_fit_are_refused(values, chosen):
    problem = LabelEncoder.fit(values, (), chosen).problem
    assert problem is not None and f"run.dataset.label_names names {', '.join(chosen)}" in problem


def test_an_index_means_what_its_own_split_says():
    """Class 1 of a split with two of the three classes is not class 1 of the other."""
    encoder = LabelEncoder.fit([0, 1, 2], ("bad", "fair", "good"))
    assert encoder.encode([0, 1], ("bad", "good")).tolist() == [0, 2]
    assert encoder.describe_unknown([0, 1], ("bad", "fine")) == (
        "1 labels outside the classes bad, fair, good, first row 1: 'fine'"
    )
    assert "integers and names cannot be matched" in str(encoder.describe_unknown([0, 1]))
    assert encoder.encode(["good", "bad"]).tolist() == [2, 0]


def test_labels_outside_the_classes_are_counted_and_the_first_is_named():
    encoder = LabelEncoder.fit([0, 1])
    assert encoder.describe_unknown([0, -1, 2]) == (
        "2 labels outside the classes 0, 1, first row 1: -1; -1 marks the hidden labels of a GLUE test split"
    )
    assert encoder.describe_unknown([[1], 0]) == "1 labels outside the classes 0, 1, first row 0: [1]"
    assert encoder.describe_unknown([None, 0]) == "1 labels outside the classes 0, 1, first row 0: None"
    assert LabelEncoder.fit([0.5]).describe_unknown([0.5]) is None, "without classes the reason is another"


def test_numbers_as_numbers_and_as_text():
    values = ["1.5", 2, "-3e2", " 4 ", ".5"]
    assert describe_other_than_numbers(values) is None
    assert (
        encode_numbers(values).tolist() == [1.5, 2.0, -300.0, 4.0, 0.5] and encode_numbers(values).dtype == np.float32
    )
    for wrong in ("nan", "inf", "1_000", "١", "0x10", "", None, True, "1e400", float("nan"), [1.0]):
        assert describe_other_than_numbers([1.0, wrong]) == f"1 labels are no finite numbers, first row 1: {wrong!r}"
