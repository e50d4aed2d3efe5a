"""What two identities differ in, named by its keys."""

from __future__ import annotations

from fwlora.experiment.resume.identity import find_differences

RECORDED = {
    "run": {"training": {"seed": 1, "options": {}}, "space": {"lr": {"low": 0.1}}},
    "weights": {"model.safetensors": "ab"},
    "environment": {"threads": 2},
}


def test_changed_added_and_removed_keys_are_differences():
    now = {
        "run": {
            "training": {"seed": 2, "options": {"min_lr": 0.1}},
            "space": {"lr": {"low": 0.1}, "alpha": {"low": 1}},
        },
        "weights": {"model.safetensors": "ab", "more.safetensors": "cd"},
        "environment": {"threads": 4},
    }
    defining, surrounding = find_differences(RECORDED, now)
    assert defining == [
        "run.training.seed: 1 then, 2 now",
        "run.training.options: {} then, not there now",
        "run.training.options.min_lr: not there then, 0.1 now",
        "run.space.alpha.low: not there then, 1 now",
        "weights.more.safetensors: not there then, 'cd' now",
    ]
    assert surrounding == ["environment.threads: 2 then, 4 now"]
    assert find_differences(RECORDED, RECORDED) == ([], [])


def test_what_an_earlier_attempt_could_not_know_is_no_difference():
    fetched = {**RECORDED, "added later": {"x": 1}}
    assert find_differences({**RECORDED, "weights": {}}, fetched) == ([], [])
