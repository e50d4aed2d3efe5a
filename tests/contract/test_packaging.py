"""The wheel: what it holds and declares, and that it works away from this repository, without and with the extra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fwlora
from tests.gate.differences import find_differences
from tests.helpers.paths import REPOSITORY

GATE = REPOSITORY / "tests" / "gate"
# Packages that the library may lack; a package that is not found is as good as one that is not installed.
START = """
import importlib.abc, sys
from pathlib import Path

class Without:
    def __init__(self, finder, refused):
        self.finder, self.refused = finder, refused

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.refused else self.finder.find_spec(name, path, target)

installed, refused = sys.argv[1], set(sys.argv[2].split(","))
elsewhere = [entry for entry in sys.path if not (Path(entry or ".") / "fwlora").is_dir()]
sys.path[:] = [installed, *elsewhere]
sys.meta_path[:] = [Without(finder, refused) for finder in sys.meta_path]
"""
END = """
homes = {Path(module.__file__) for name, module in sys.modules.items() if name.split(".")[0] == "fwlora"}
assert homes and all(home.is_relative_to(installed) for home in homes), homes
assert not refused & {name.split(".")[0] for name in sys.modules}
assert "src" not in sys.modules
"""
TRAINING = """
import torch
from peft import get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification
import fwlora.trainer
from fwlora import FisherWeightedLora, FwLoraConfig

torch.manual_seed(0)
shape = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
base = RobertaForSequenceClassification(RobertaConfig(**shape, max_position_embeddings=20))
config = FwLoraConfig.for_model(base, budget_percent=20.0, task_type="SEQ_CLS", strength=0.1, warmup_steps=2)
model = get_peft_model(base, config)
fw = FisherWeightedLora(model)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(4):
    tokens = torch.randint(4, 30, (6, 9))
    model(input_ids=tokens, labels=tokens[:, 0] % 2).loss.backward()
    fw.step()
    optimizer.step()
    optimizer.zero_grad()
assert abs(sum(fw.importance().values()) - 1) < 1e-5 and len(fw.importance()) == 10
assert float(fw.last_penalty) > 0 and all(norm > 0 for norm in fw.norms().values())
print("trained")
"""
EVALUATION = """
import json, runpy
files = runpy.run_path(sys.argv[3])["evaluate"]()
Path("made.json").write_text(json.dumps(files))
"""
PLAN = """
import runpy
sys.argv = ["fwlora", "plan", sys.argv[3], "--budget", "20", "--json"]
try:
    runpy.run_module("fwlora.experiment.cli", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's files in a folder of their own, which is all that installing a pure wheel does."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(installed) -> Distribution:
    (folder,) = installed.glob("*.dist-info")
    return PathDistribution(folder)


def list_requirements(metadata: Distribution, extra: str = "") -> list[Requirement]:
    """Return what the distribution requires, of an extra alone where one is named."""
    requirements = [Requirement(line) for line in metadata.requires or []]
    chosen = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
    return [r for r in chosen if not extra or (r.marker and not r.marker.evaluate({"extra": ""}))]


def find_required(requirements: list[Requirement]) -> set[str]:
    """Return the names of the distributions, and of all that they require."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in found:
            found.add(name)
            waiting += list_requirements(distribution(name))
    return found


def find_modules_of_the_extra_alone(metadata: Distribution) -> set[str]:
    """Return the top modules that the extra brings and the library cannot count on."""
    library = find_required(list_requirements(metadata))
    extra = {canonicalize_name(r.name) for r in list_requirements(metadata, "experiment")} - library
    return {
        module
        for module, owners in packages_distributions().items()
        if owners and {canonicalize_name(owner) for owner in owners} <= extra
    }


def run_away_from_here(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", START + code + END, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_content(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fwlora"}
    listed = subprocess.run(["git", "ls-files", "fwlora"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    packed = {name for name in names if ".dist-info/" not in name}
    assert set(listed.stdout.split()) <= packed
    assert {name.rsplit(".", 1)[-1] for name in packed} == {"py", "typed", "jinja", "css", "js", "json", "c"}


def test_metadata(metadata):
    fields = metadata.metadata
    assert (fields["Name"], fields["Version"]) == ("fwlora", fwlora.__version__)
    assert (fields["License-Expression"], fields["License-File"]) == ("Apache-2.0", "LICENSE")
    assert fields["Requires-Python"] == ">=3.11"
    assert fields.get_all("Provides-Extra") == ["experiment"]
    assert fields["Description-Content-Type"] == "text/markdown"
    required = {canonicalize_name(requirement.name) for requirement in list_requirements(metadata)}
    assert required == {"numpy", "peft", "safetensors", "torch", "transformers"}
    assert {"wandb", "hydra-core", "optuna"} <= {r.name for r in list_requirements(metadata, "experiment")}
    (command,) = metadata.entry_points
    assert (command.group, command.name, command.value) == ("console_scripts", "fwlora", "fwlora.experiment.cli:main")


def test_library_works_without_the_packages_of_the_extra(installed, metadata, tmp_path):
    refused = find_modules_of_the_extra_alone(metadata)
    assert {"wandb", "hydra", "omegaconf", "optuna", "pandas", "scipy", "sklearn", "matplotlib"} <= refused
    assert not {"torch", "peft", "transformers", "numpy", "accelerate", "tokenizers"} & refused
    done = run_away_from_here(TRAINING, tmp_path, str(installed), ",".join(refused))
    assert done.stdout == "trained\n"
    # The refusal is worth something only if it does refuse.
    lines = ["try:", "    import fwlora.experiment.settings.hydra_arguments", "except ModuleNotFoundError as error:"]
    code = "\n".join([*lines, "    print(error.name)", "import fwlora\n"])
    assert run_away_from_here(code, tmp_path, str(installed), ",".join(refused)).stdout == "hydra\n"


def test_plan_works_from_the_wheel(installed, tmp_path):
    shape = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "model").mkdir()
    settings = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "intermediate_size": 32, **shape}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    done = run_away_from_here(PLAN, tmp_path, str(installed), "", "model")
    plan = json.loads(done.stdout)
    assert len(plan["ranks"]) == 10 and 0 < plan["cost"] <= plan["budget"]


def test_evaluation_from_the_wheel_makes_the_recorded_files(installed, tmp_path):
    run_away_from_here(EVALUATION, tmp_path, str(installed), "", str(GATE / "evaluation_case.py"))
    expected = json.loads((GATE / "expected" / "evaluation.json").read_text())
    assert list(find_differences(expected, json.loads((tmp_path / "made.json").read_text()), 1e-9)) == []


def test_no_module_of_the_wheel_reads_files_of_the_repository():
    modules = {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in REPOSITORY.glob("fwlora/**/*.py")}
    naming = [name for name, text in modules.items() if re.search(r"\b(REPOSITORY|CONFIG_DIR)\b", text)]
    assert naming == ["fwlora/experiment/paths.py"]
