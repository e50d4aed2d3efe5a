"""Run files, the command line and their validation."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from typing import get_args

import pytest
from omegaconf import OmegaConf

from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.hydra_arguments import (
    Invocation,
    TaskError,
    compose_settings,
    enter_program,
    known_run_ids,
    prepare_arguments,
)
from fwlora.experiment.settings.modes import TRIAL_BATCHES
from fwlora.experiment.settings.resolve import check_schedules
from fwlora.experiment.settings.schema import TrainingSettings, program_settings_class
from tests.helpers.paths import CONFIG_DIR
from tests.helpers.toy_tracker import registered_toy

PROPOSED = "proposed-roberta-base-110M--SST-2-GLUE"
LORA = "comparative-1-roberta-base-110M--SST-2-GLUE"
ADALORA = "comparative-2-roberta-base-110M--SST-2-GLUE"
DESIGN = [
    f"{method}-roberta-base-110M--{task}-GLUE{budget}"
    for method in ("comparative-1", "comparative-2", "comparative-3", "proposed")
    for task in ("CoLA", "SST-2")
    for budget in ("", "-b0.1", "-b0.5")
]


# Seven levels of ten aliases each stand for ten million values.
BOMB = "run_id: mine\nl0: &l0 [x]\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 8))


def resolve(*arguments: str, run: str = PROPOSED, mode: str = "full", environment=None):
    return compose_settings([f"run={run}", f"mode={mode}", *arguments], CONFIG_DIR, environment or {})


def message(*arguments: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*arguments, **options)
    return str(caught.value)


def test_the_specified_run_files_are_verbatim():
    digests = {
        name: hashlib.sha256((CONFIG_DIR / "runs" / f"{name}.yaml").read_bytes()).hexdigest()
        for name in (PROPOSED, LORA)
    }
    assert digests == {
        PROPOSED: "4920e6ca8ebc8b38e8d1156c27d9d9aa238d183042aa28dbc2b41c3eb4ee5a16",
        LORA: "1f4203625395e8ee6be05107a25631dc74c9c649b1c4e3d0587901b1ef1418e5",
    }


@pytest.mark.parametrize("run_id", [run_id for run_id in DESIGN if run_id.startswith("proposed")])
def test_the_control_differs_in_its_importance_alone(run_id):
    proposed = resolve(run=run_id).run.model_dump()
    control = resolve(run=run_id.replace("proposed", "comparative-3", 1)).run.model_dump()
    assert control["fw_lora"].pop("importance") == "none" and proposed["fw_lora"].pop("importance") == "sum"
    assert control.pop("run_id") != proposed.pop("run_id")
    assert control == proposed


def hand_over(settings, *overrides: str) -> str:
    (handed,) = Invocation(settings, overrides, "python -u -m src.main 'a b'").hand_over().values()
    return handed


@pytest.mark.parametrize("mode", ["trial", "full"])
@pytest.mark.parametrize("run_id", [PROPOSED, LORA, ADALORA])
def test_a_child_takes_over_what_its_parent_composed(run_id, mode):
    settings = resolve("run.training.max_gradient_norm=1.5", "wandb.entity=me", run=run_id, mode=mode)
    taken = Invocation.take_over(["x", "y"], hand_over(settings, "x", "y"))
    assert taken == Invocation(settings, ("x", "y"), "python -u -m src.main 'a b'")
    assert type(taken.settings.run) is type(settings.run) and taken.settings.as_record() == settings.as_record()


def test_a_child_of_other_arguments_composes_for_itself():
    settings = resolve()
    assert Invocation.take_over(["x"], None) is None
    assert Invocation.take_over(["x", "z"], hand_over(settings, "x", "y")) is None
    with registered_toy():
        by_toy = resolve("tracker=toy", "toy.folder=here")
        assert Invocation.take_over(["x"], hand_over(by_toy, "x")).settings.tracker_settings.folder == "here"


def enter(monkeypatch, hydra_main, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    enter_program("src.main", hydra_main, lambda invocation: None, CONFIG_DIR)


def test_errors_of_a_task_stay_what_they_are_and_those_of_hydra_are_a_users_mistake(monkeypatch, capsys):
    typed = [f"run={PROPOSED}", "mode=full"]

    def fail_in_the_task() -> None:
        raise TaskError(KeyError("a fault of the program"))

    def fail_to_compose() -> None:
        assert os.environ["HYDRA_FULL_ERROR"] == "1" and sys.argv[1:3] == [f"runs@run={PROPOSED}", "++mode=full"]
        raise ValueError("no\nsuch   thing")

    with pytest.raises(KeyError, match="a fault of the program"):
        enter(monkeypatch, fail_in_the_task, *typed)
    with pytest.raises(SystemExit) as ended:
        enter(monkeypatch, fail_to_compose, *typed)
    assert ended.value.code == 2 and "HYDRA_FULL_ERROR" not in os.environ
    assert capsys.readouterr().err == f"error: config/runs/{PROPOSED}.yaml cannot be composed: no such thing\n"


def test_the_whole_design_can_be_named():
    assert set(DESIGN) <= set(known_run_ids(CONFIG_DIR))


@pytest.mark.parametrize("run_id", known_run_ids(CONFIG_DIR))
def test_every_run_file_is_valid_and_says_what_its_name_says(run_id):
    run = resolve(run=run_id).run
    assert run.run_id == run_id
    proposed = "comparative-3-" if run.fw_lora and run.fw_lora.importance == "none" else "proposed-"
    prefix = {"baseline_lora": "comparative-1-", "adalora": "comparative-2-", "proposed_fw_lora": proposed}
    assert run_id.startswith(prefix[run.method])
    if "GLUE" in run_id:
        assert run.dataset.subset == ("cola" if "CoLA" in run_id else "sst2")
        named = run_id.rpartition("-b")[2] if "GLUE-b" in run_id else "0.2"
        assert run.model.parameter_budget_percent == float(named)
        assert run.model.lora.scaling == 2.0


@pytest.mark.parametrize("task", ["CoLA-GLUE", "SST-2-GLUE", "CoLA-GLUE-b0.1", "SST-2-GLUE-b0.5"])
def test_methods_are_compared_under_equal_settings(task):
    runs = [resolve(run=f"{m}-roberta-base-110M--{task}").run for m in ("comparative-1", "comparative-2", "proposed")]
    shared = [run.model_dump(include={"model", "dataset", "training"}) for run in runs]
    assert shared[0] == shared[1] == shared[2]


def test_yaml_files_of_studies_and_the_base_are_readable():
    files = [CONFIG_DIR / "config.yaml", *sorted((CONFIG_DIR / "study").glob("*.yaml"))]
    assert len(files) >= 2
    for path in files:
        assert OmegaConf.to_container(OmegaConf.load(path)), path


def test_base_configuration_states_the_specified_wandb_target():
    wandb = OmegaConf.load(CONFIG_DIR / "config.yaml").wandb
    assert (wandb.entity, wandb.project, wandb.mode) == ("gengaru617-personal", "251106-test", "online")


def list_fields(model, path: str = ""):
    """Yield (dotted key, field) of a class and of the classes in it."""
    for name, field in model.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if hasattr(each, "model_fields")]
        if inner:
            yield from list_fields(inner[0], f"{path}{name}.")
        else:
            yield f"{path}{name}", field


def list_values(node, path: str = ""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from list_values(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_the_base_configuration_states_the_defaults_of_the_classes():
    """Every value of config.yaml is its class's default, and it leaves out no default of a section that it has."""
    node = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "config.yaml"), resolve=False)
    stated = dict(list_values({key: value for key, value in node.items() if key not in ("defaults", "hydra")}))
    fields = dict(list_fields(program_settings_class()))
    chosen = {"mode", "wandb.entity", "wandb.project"}  # what every user has to choose
    assert {key for key in stated if fields[key].is_required()} == chosen
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    assert {key: value for key, value in stated.items() if key not in chosen} == {
        key: defaults[key] for key in stated if key not in chosen
    }
    sections = {key.rpartition(".")[0] for key in stated}
    left_out = {
        key for key, field in fields.items() if key.rpartition(".")[0] in sections and not field.is_required()
    } - set(stated)
    assert left_out == set()


def test_command_line_wins_over_file_and_file_over_defaults():
    run = resolve("run.training.epochs=1", "run.model.lora.dropout=0.0", "run.training.max_gradient_norm=1.0").run
    assert (run.training.epochs, run.model.lora.dropout, run.training.max_gradient_norm) == (1, 0.0, 1.0)
    assert run.training.batch_size == 32 and run.model.budget_mode == "budget"


def test_all_mistakes_are_reported_at_once_with_their_paths():
    text = message(
        "run.training.epoch=1", "run.training.epochs=x", "run.training.batch_size=1.5", "run.model.lora.dropout=1.0",
        "run.dataset.truncation=yes_please", "surplus=1", "run.optuna.search_space.learning_rate.low=-3",
        "run.optuna.search_space.batch_size.choices=[0]", "run.method=magic",
    )  # fmt: skip
    for line in (
        "run.training.epoch: unknown key; did you mean `epochs`?",
        "run.training.epochs = 'x': ",
        "run.training.batch_size = 1.5: ",
        "run.model.lora.dropout = 1.0: ",
        "run.dataset.truncation = 'yes_please': ",
        "surplus: unknown key",
        "run.optuna.search_space.learning_rate.low = -3: ",
        "run.method = 'magic': ",
    ):
        assert f"\n  - {line}" in text, line
    assert text.startswith(f"config/runs/{PROPOSED}.yaml and its overrides (")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("run.optuna.search_space.batch_size.choices=[0,16]", "`optuna.search_space.batch_size` reaches 0"),
        ("run.optuna.search_space.warmup_steps.low=900", "`low` 900 must be below `high` 800"),
        (
            "run.optuna.search_space.momentum={type: uniform, low: 0.0, high: 1.0}",
            "`optuna.search_space.momentum` is not",
        ),
        ("run.optuna.search_space.init_rank_factor={type: uniform, low: 1.0, high: 2.0}", "belongs to adalora, not to"),
        (
            "run.optuna.search_space.learning_rate.type=normal",
            "search_space.learning_rate.type = 'normal': choose one of",
        ),
        ("run.fw_lora=null", "method proposed_fw_lora needs the node `fw_lora`"),
        ("run.training.seed=-1", "run.training.seed = -1"),
        ("run.model.lora.target_modules=[]", "run.model.lora.target_modules = []"),
        ("run.run_id='a/b'", "'/'"),
        ("run.run_id=..", "`run_id` '..' is taken"),
        ("run.run_id=comparison", "`run_id` 'comparison' is taken"),
        ("run.training=5", "run.training = 5"),
        ("run.optuna=5", "run.optuna = 5"),
        ("run.adalora=3", "run.adalora.(not a section) = 3"),
        ("run.training.learning_rate=nan", "run.training.learning_rate"),
        ("engine.device=tpu", "engine.device = 'tpu'"),
        (  # exponents in place of values
            "run.optuna.search_space={learning_rate: {type: loguniform, low: -3, high: -1}}",
            "run.optuna.search_space.learning_rate.low = -3: input should be greater than 0",
        ),
    ],
)
def test_refused_values_name_their_place(argument, expected):
    assert expected in message(argument)


def test_first_generation_search_spaces_may_say_distribution_type():
    run = resolve(
        "run.optuna.search_space={learning_rate: {distribution_type: loguniform, low: 1.0e-4, high: 1.0e-3}}"
    ).run
    assert run.optuna.search_space["learning_rate"].high == 1e-3


def test_settings_of_another_method_are_refused_but_defaults_are_dropped():
    assert "run.fw_lora.importance = 'none' is read by proposed_fw_lora only" in message(
        "run.fw_lora.importance=none", run=LORA
    )
    run = resolve(run=LORA).run
    assert run.fw_lora is None and run.adalora is None
    assert resolve(run=ADALORA).run.adalora.orth_reg_weight == 0.5


@pytest.mark.parametrize(
    ("arguments", "run_id", "seed"),
    [
        ([f"run={PROPOSED}"], PROPOSED, 42),
        ([f"run={PROPOSED}-s7"], f"{PROPOSED}-s7", 7),
        ([f"run={PROPOSED}", "run.training.seed=7"], f"{PROPOSED}-s7", 7),
        ([f"run={PROPOSED}-s7", "run.training.seed=7"], f"{PROPOSED}-s7", 7),
        ([f"run={PROPOSED}", "run.training.seed=42"], PROPOSED, 42),
        ([f"run={PROPOSED}", "run.run_id=mine", "run.training.seed=7"], "mine-s7", 7),
    ],
)
def test_seeds_and_run_ids(arguments, run_id, seed):
    run = compose_settings([*arguments, "mode=full"], CONFIG_DIR, {}).run
    assert (run.run_id, run.training.seed) == (run_id, seed)


def test_trial_limits_every_method_and_disables_wandb_whatever_was_asked():
    for run_id in (PROPOSED, LORA, ADALORA):
        settings = resolve("wandb.mode=online", "wandb.required=true", run=run_id, mode="trial")
        run = settings.run
        assert (settings.wandb.mode, settings.wandb.required) == ("disabled", False)
        assert (run.training.epochs, run.optuna.n_trials, run.training.gradient_accumulation_steps) == (1, 0, 1)
        assert run.training.total_steps(run.dataset.train_examples) == TRIAL_BATCHES == 2
        assert run.dataset.eval_examples == 2 * run.training.batch_size
        assert run.fw_lora is None or run.fw_lora.warmup_steps == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "mode"),
    [
        ([], {}, "online"),
        ([], {"WANDB_MODE": "offline"}, "offline"),
        (["wandb.mode=online"], {"WANDB_MODE": "offline"}, "online"),
        (["wandb.mode=disabled"], {"WANDB_MODE": "offline"}, "disabled"),
        ([], {"WANDB_MODE": ""}, "online"),
    ],
)
def test_which_wandb_mode_wins(arguments, environment, mode):
    assert resolve(*arguments, environment=environment).wandb.mode == mode


def test_text_and_null():
    run = resolve("run.model.revision=null", "run.dataset.revision=1234", environment={"WANDB_PROJECT": "123"})
    assert run.run.model.revision is None and run.run.dataset.revision == "1234" and run.wandb.project == "123"


def test_entity_and_project_come_from_file_environment_command_line():
    environment = {"WANDB_ENTITY": "team", "WANDB_PROJECT": "study"}
    assert resolve().wandb.entity == "gengaru617-personal"
    assert resolve(environment=environment).wandb.project == "study"
    assert resolve("wandb.entity=me", environment=environment).wandb.entity == "me"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ".research/results"),
        ("a=b", "a=b"),
        ("a (b) c", "a (b) c"),
        ("2024", "2024"),
        ("a,b", "a,b"),
        ("it's", "it's"),
    ],
)
def test_results_dir_is_text_whatever_it_looks_like(value, expected):
    assert resolve(f"results_dir={value}").results_dir == expected


def test_preparing_twice_changes_nothing():
    once = prepare_arguments([f"run={PROPOSED}-s3", "mode=full", "results_dir=a=b"], CONFIG_DIR, {})
    assert sorted(prepare_arguments(once, CONFIG_DIR, {})) == sorted(once)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mode=full"], ["run is missing", PROPOSED]),
        ([f"run={PROPOSED}"], ["mode is missing"]),
        ([f"run={PROPOSED}", "mode=fast"], ["mode is fast; give mode=trial or mode=full"]),
        (["run=proposed", "mode=full"], ["run=proposed: unknown run id", PROPOSED, LORA]),
        (["run=../config", "mode=full"], ["holds no path separator"]),
        ([f"run={PROPOSED}-s7", "run.training.seed=8", "mode=full"], ["means seed 7, but run.training.seed=8"]),
        ([f"run={PROPOSED}", f"run={LORA}", "mode=full"], ["run is given twice"]),
        ([f"run={PROPOSED}-s07", "mode=full"], ["unknown run id"]),
        ([f"run={PROPOSED}-s7", "run.run_id=mine", "mode=full"], ["name two ids"]),
        ([f"run={PROPOSED}", "mode=full", "epochs"], ["'epochs' is not of the form key=value"]),
        (["run=x", "mode=y"], ["2 problems", "unknown run id", "mode is y"]),
    ],
)
def test_command_line_mistakes(arguments, expected):
    with pytest.raises(UserError) as caught:
        compose_settings(arguments, CONFIG_DIR, {})
    assert all(part in str(caught.value) for part in expected), str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("run_id: other\nmethod: baseline_lora\n", "run_id is 'other'; it must be the file's name, 'mine'"),
        ("run_id: mine\nmethod: [unclosed\n", "config/runs/mine.yaml: cannot be read: line 3"),
        ("run_id: mine\nmethod: baseline_lora\nmodel: 3\n", "run.model = 3"),
        ("run_id: mine\nmethod: baseline_lora\n", "run.training.epochs: missing"),
        ("run_id: mine\nmethod: baseline_lora\ntraining: 5\n", "run.training = 5"),
        ("5\n", "config/runs/mine.yaml: cannot be read: "),
        ("run_id: &x {a: *x}\n", "config/runs/mine.yaml: holds more than 100,000 values, or an alias of itself"),
        (BOMB, "config/runs/mine.yaml: holds more than 100,000 values"),
        ("run_id: \udcff\n", "config/runs/mine.yaml: cannot be read: byte 8 is no UTF-8"),
        ("[" * 900, "config/runs/mine.yaml"),
        ("- a\n", "config/runs/mine.yaml"),
    ],
)
def test_broken_run_files(tmp_path, content, expected):
    shutil.copytree(CONFIG_DIR, tmp_path / "config")
    (tmp_path / "config" / "runs" / "mine.yaml").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        compose_settings(["run=mine", "mode=full"], tmp_path / "config", {})
    assert expected in str(caught.value), str(caught.value)


def test_steps_of_the_two_tasks():
    training: TrainingSettings = resolve().run.training
    assert training.total_steps(8_551) == 804
    assert training.total_steps(67_349) == 6_315
    halved = training.model_copy(update={"gradient_accumulation_steps": 4})
    assert halved.steps_per_epoch(8_551) == 67


def test_a_warmup_that_never_ends_is_an_error_and_a_long_one_a_warning(caplog):
    run = resolve("run.fw_lora.warmup_steps=500").run
    with pytest.raises(UserError, match=r"run\.fw_lora\.warmup_steps is 500, but the run has 500"):
        check_schedules(run, 500)
    check_schedules(run, 1000)
    assert not caplog.records
    check_schedules(run, 804)
    assert "the Fisher warm-up takes 500 of 804 optimizer steps" in caplog.text


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "x-${ oc.env:HOME}", "${oc.decode:${oc.env:HOME}}", "[a,'${oc.env:HOME}']"]
)
def test_environment_variables_are_not_read_into_settings(value, monkeypatch):
    monkeypatch.setenv("HOME", "a-secret")
    with pytest.raises(UserError) as caught:
        resolve(f"run.model.name={value}")
    assert "run.model.name" in str(caught.value) and "would write an environment variable" in str(caught.value)
    assert "a-secret" not in str(caught.value)


def test_a_sweep_whose_jobs_would_share_a_run_id_is_refused():
    def prepare(*arguments: str, mode: str = "full") -> list[str]:
        return prepare_arguments(["--multirun", f"run={LORA}", f"mode={mode}", *arguments], CONFIG_DIR, {})

    with pytest.raises(UserError) as caught:
        prepare("run.training.learning_rate=1e-3,4e-3", "run.training.epochs=range(1,3)")
    for told in (
        "varies run.training.learning_rate=1e-3,4e-3", "run.training.learning_rate=0.001", "one run id",
        "varies run.training.epochs=range(1,3)",
    ):  # fmt: skip
        assert told in str(caught.value)
    assert prepare("run.training.seed=1,2") and prepare(f"run={LORA}")
    assert prepare("run.model.lora.target_modules=[query,key]")
    assert prepare("run.training.learning_rate=1e-3,4e-3", mode="trial")


@pytest.mark.parametrize("run_id", ["1e3", "a,b", "a b", "12", "null", "a=b", "é"])
def test_files_that_cannot_be_run_ids_are_refused_in_our_words(run_id, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{run_id}.yaml").write_text(f"run_id: {run_id}\n")
    with pytest.raises(UserError, match=r"a run id is of letters, digits, .*, and is no number"):
        prepare_arguments([f"run={run_id}", "mode=trial"], tmp_path, {})


def test_the_search_maximizes():
    with pytest.raises(UserError, match=r"run\.optuna\.direction = 'minimize'.*'maximize'"):
        resolve("run.optuna.direction=minimize")


def test_a_home_folder_is_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve("results_dir=~/out").results_dir == "/home/someone/out"
    assert resolve("results_dir=a~b").results_dir == "a~b"


def test_values_nested_too_deep_are_refused_in_a_line():
    with pytest.raises(UserError) as caught:
        resolve("run.training.learning_rate=" + "[" * 900)
    assert "run.training.learning_rate" in str(caught.value)


@pytest.mark.parametrize(("given", "mode"), [("dryrun", "offline"), ("run", "online"), ("offline", "offline")])
def test_wandbs_older_names_of_its_modes(given, mode):
    assert resolve(environment={"WANDB_MODE": given}).wandb.mode == mode


def test_a_run_id_fits_a_files_name():
    with pytest.raises(UserError, match=r"`run_id` has 200 bytes; .*128"):
        resolve("run.run_id=" + "a" * 200)
