"""Label columns become classes, or a reason why they cannot."""

from __future__ import annotations

import pytest

from fwlora.experiment.data.labels import LabelEncoder


@pytest.mark.parametrize(
    ("values", "declared", "names", "encoded"),
    [
        ([0, 2, 1], None, ("0", "1", "2"), [0, 2, 1]),
        (["no", "yes", "no"], None, ("no", "yes"), [0, 1, 0]),
        ([1, 0], ["unacceptable", "acceptable"], ("unacceptable", "acceptable"), [1, 0]),
    ],
)
def test_classes_come_from_integers_strings_or_declared_names(values, declared, names, encoded):
    encoder = LabelEncoder.fit(values, declared)
    assert (encoder.names, encoder.problem) == (names, None)
    assert encoder.encode(values).tolist() == encoded and encoder.describe_unknown(values) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.5], "holds neither integers nor strings, but [0.5]; labels are classes"),
        ([], "holds neither integers nor strings, but []; labels are classes"),
        ([0, "a"], "holds neither integers nor strings, but [0]; labels are classes"),
        ([0, 0], "has 1 classes; 2 to 256 classes can be learnt"),
        ([0, 400], "has labels up to 400; 2 to 256 classes can be learnt"),
        ([-1, -1], "has 0 classes; 2 to 256 classes can be learnt"),
    ],
)
def test_classes_that_cannot_be_learnt_have_a_reason(values, expected):
    assert LabelEncoder.fit(values).problem == expected


def test_labels_outside_the_classes_are_counted_and_the_first_is_named():
    encoder = LabelEncoder.fit([0, 1])
    assert encoder.describe_unknown([0, -1, 2]) == (
        "2 labels outside the classes 0, 1, first row 1: -1; -1 marks the hidden labels of a GLUE test split"
    )
    assert encoder.describe_unknown([[1], 0]) == "1 labels outside the classes 0, 1, first row 0: [1]"
    assert LabelEncoder.fit([0.5]).describe_unknown([0.5]) is None, "without classes the reason is another"
