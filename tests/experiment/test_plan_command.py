"""``fwlora plan``: the rank table of a model that is only a configuration."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fwlora.experiment.cli import main


@pytest.fixture
def config_folder(tmp_path):
    """roberta-base's shape, without any weights."""
    settings = {
        "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 50265, "hidden_size": 768,
        "max_position_embeddings": 514, "type_vocab_size": 1, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    return str(tmp_path / "model")


def test_table_of_roberta_base(config_folder, capsys):
    assert main(["plan", config_folder, "--budget", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "budget: 0.2 % of 124,055,040 encoder parameters = 248,110" in printed
    assert "used:   248,064 (99.9 %) on 60 of 60 matrices, ranks 1 and 2" in printed
    rows = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│ encoder")}
    assert len(rows) == 5 and "768 -> 3072" in rows["encoder.layer.*.intermediate.dense"]
    ranks = [cell for row in rows.values() for cell in row.split("│")[3:-1]]
    assert len(ranks) == 60 and {cell.strip() for cell in ranks} == {"1", "2"}


def test_narrow_terminals_do_not_cut_the_table(config_folder):
    done = subprocess.run(
        [sys.executable, "-m", "fwlora.experiment.cli", "plan", config_folder, "--budget", "0.1"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "40", "PATH": "", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert "encoder.layer.*.attention.self.query" in done.stdout and "…" not in done.stdout
    assert " . │" in done.stdout and "ranks 0 and 1" in done.stdout


def test_json_and_named_targets(config_folder, capsys):
    assert main(["plan", config_folder, "--budget", "0.5", "--target-modules", "query", "value", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cost"] <= plan["budget"] == 620_275
    assert len(plan["ranks"]) == 24 and sum(plan["ranks"].values()) * 1536 == plan["cost"]


def test_what_gets_no_adapter_is_said_once(tmp_path, capsys):
    """A Mixtral: its experts are one tensor each, which no linear layer's adapter fits."""
    settings = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 200, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "num_local_experts": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = ["plan", str(tmp_path), "--budget", "5"]
    assert main(command) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 1 and "experts" in lines[0] and "Warning" not in printed.err
    assert main([*command, "--json"]) == 0
    assert any("experts" in text for text in json.loads(capsys.readouterr().out)["left_out"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budget", "0"], "--budget: `budget_percent` is 0.0; a budget is above 0"),
        (["--budget", "0.0001"], "use at least 0.0013 %"),
        (["--budget", "0.2", "--target-modules", "qkv"], "--target-modules: no weight matrix of RobertaModel"),
    ],
)
def test_mistakes_end_in_one_message(config_folder, arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", config_folder, *arguments])
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_model_that_cannot_be_had(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "no/such-model", "--budget", "0.2"])
    assert "model = 'no/such-model' cannot be fetched" in capsys.readouterr().err
