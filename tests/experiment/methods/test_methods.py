"""The registry of methods, and a method of one's own through every place that settings go."""

from __future__ import annotations

import shutil

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.methods import (
    MethodSpec,
    find_method,
    get_method,
    known_methods,
    method_nodes,
    register_method,
)
from fwlora.experiment.search import trial_settings
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.settings.resolve import check_schedules
from fwlora.experiment.settings.schema import run_settings_class, searchable_paths
from tests.helpers.paths import CONFIG_DIR
from tests.helpers.toy_method import ToyMethod, ToySettings, registered_toy

LORA = "comparative-1-roberta-base-110M--CoLA-GLUE"


@pytest.fixture
def toy_config(tmp_path):
    """A configuration folder with the run file ``toy`` of the method, while that is registered."""
    shutil.copytree(CONFIG_DIR, tmp_path / "config")
    text = (CONFIG_DIR / "runs" / f"{LORA}.yaml").read_text()
    text = text.replace(LORA, "toy").replace("baseline_lora", "toy_method") + "toy:\n  pause: 100\n"
    (tmp_path / "config" / "runs" / "toy.yaml").write_text(text)
    with registered_toy():
        yield tmp_path / "config"


def test_built_in_methods_are_registered_by_their_names_in_run_files():
    assert list(known_methods()) == ["baseline_lora", "adalora", "proposed_fw_lora"]
    assert {node: spec.name for node, spec in method_nodes().items()} == {
        "adalora": "adalora",
        "fw_lora": "proposed_fw_lora",
    }
    assert find_method("toy_method") is None
    with pytest.raises(UserError, match=r"'toy_method' is not registered; known: baseline_lora, adalora, proposed_fw"):
        get_method("toy_method")


def test_what_a_search_may_vary_is_what_the_fields_say():
    assert searchable_paths() == {
        "lora_rank": ("model", "lora", "rank"),
        "lora_alpha": ("model", "lora", "alpha"),
        "lora_dropout": ("model", "lora", "dropout"),
        "epochs": ("training", "epochs"),
        "batch_size": ("training", "batch_size"),
        "learning_rate": ("training", "learning_rate"),
        "weight_decay": ("training", "weight_decay"),
        "warmup_ratio": ("training", "warmup_ratio"),
        "init_rank_factor": ("adalora", "init_rank_factor"),
        "orth_reg_weight": ("adalora", "orth_reg_weight"),
        "lambda_fw": ("fw_lora", "lambda_fw"),
        "warmup_steps": ("fw_lora", "warmup_steps"),
        "fisher_alpha": ("fw_lora", "fisher_alpha"),
    }


def test_a_method_of_ones_own_has_its_settings_in_run_files(toy_config):
    run = compose_settings(["run=toy", "mode=full", "run.toy.shade=red"], toy_config, {}).run
    assert run.method_settings == run.toy == ToySettings(pause=100, shade="red")
    assert run.model_dump()["toy"] == {"pause": 100, "shade": "red"} and run.model_dump()["fw_lora"] is None
    assert compose_settings(["run=toy", "mode=trial"], toy_config, {}).run.toy.pause == 0
    other = compose_settings([f"run={LORA}", "mode=full"], toy_config, {}).run
    assert other.toy is None and other.method_settings is None
    with pytest.raises(ValueError, match="'baseline_lora' has no settings of its own"):
        other.with_method_settings(pause=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run.toy.puase=1"], r"run\.toy\.puase: unknown key; did you mean `pause`\?"),
        (["run.toy.pause=-1"], r"run\.toy\.pause = -1: input should be greater than or equal to 0"),
        (["run.method=baseline_lora"], r"run\.toy\.pause = 100 is read by toy_method only, not by baseline_lora"),
        (["run.method=magic"], r"run\.method = 'magic': input should be one of baseline_lora, .*, toy_method"),
        (
            ["run.optuna.search_space={toy_pause: {type: int, low: -1, high: 5}}"],
            r"`optuna\.search_space\.toy_pause` reaches -1, which `toy\.pause` refuses",
        ),
    ],
)
def test_its_mistakes_are_found_like_any_others(toy_config, arguments, expected):
    with pytest.raises(UserError, match=expected):
        compose_settings(["run=toy", "mode=full", *arguments], toy_config, {})


def test_its_search_space_and_schedule_are_its_own(toy_config):
    space = "run.optuna.search_space={toy_pause: {type: int, low: 0, high: 400}}"
    run = compose_settings(["run=toy", "mode=full", space], toy_config, {}).run
    assert run.with_values({"toy_pause": 200}).toy.pause == 200
    # The run: 804 steps; the trial: 250.
    assert trial_settings(run, 8_551, 8_000).toy.pause == 100 * 250 // 804 == 31
    check_schedules(run, 101)
    with pytest.raises(UserError, match=r"run\.toy\.pause is 100 of 100 steps; lower it"):
        check_schedules(run, 100)
    with pytest.raises(UserError, match=r"search_space\.toy_pause` belongs to toy_method, not to baseline_lora"):
        compose_settings([f"run={LORA}", "mode=full", space], toy_config, {})


def test_names_and_nodes_are_taken_once(toy_config):
    class Namesake(ToyMethod):
        pass

    class Neighbour(ToyMethod):
        name = "neighbour"

    class Half(ToyMethod):
        name, settings_node, Settings = "half", "half", None

    for spec, expected in (
        (Namesake(), "`name` 'toy_method' is taken by ToyMethod"),
        (Neighbour(), "`settings_node` 'toy' is taken by toy_method"),
        (Half(), "half: give both `settings_node` and `Settings`"),
    ):
        with pytest.raises(ValueError, match=expected):
            register_method(spec)


def test_nothing_of_it_remains_once_it_is_gone():
    with registered_toy() as spec:
        assert get_method("toy_method") is spec and "toy" in run_settings_class().model_fields
    assert "toy" not in run_settings_class().model_fields and "toy_pause" not in searchable_paths()


def test_a_method_without_a_schedule_fits_any_run():
    lora: MethodSpec = get_method("baseline_lora")
    run = compose_settings([f"run={LORA}", "mode=full"], CONFIG_DIR, {}).run
    lora.check(run, 1)
    assert lora.rescale(run, 100, 2) is run is lora.limit_to_trial(run) and not lora.changes_ranks(run)
