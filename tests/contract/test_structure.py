"""The layout's rules: one direction of imports, one place for each kind of knowledge, a light library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import REPOSITORY

LIBRARY = sorted((REPOSITORY / "fwlora").glob("*.py"))
EXPERIMENT = sorted((REPOSITORY / "fwlora" / "experiment").rglob("*.py"))
PROGRAM = sorted((REPOSITORY / "src").glob("*.py"))
BENCHMARKS = sorted((REPOSITORY / "benchmarks").rglob("*.py"))
TESTS_OF_PARTS = sorted(
    path for part in ("data", "modeling") for path in (REPOSITORY / "tests" / "experiment" / part).rglob("*.py")
)
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(paths: list[Path], package: str) -> list[str]:
    return [p.name for p in paths if any(n == package or n.startswith(f"{package}.") for n in imported(p))]


def list_imported_tests(paths: list[Path]) -> dict[str, set[str]]:
    """Imports of a test module, or of a helper by another name than ``tests.*``, per file that has some."""
    stems = {path.stem for path in paths}
    found = {}
    for path in paths:
        parts = {name: name.split(".") for name in imported(path)}
        wrong = {name for name, (first, *_) in parts.items() if first in stems}
        wrong |= {
            name
            for name, (first, *rest) in parts.items()
            if first == "tests" and any(part.startswith("test_") for part in rest)
        }
        if wrong:
            found[path.name] = wrong
    return found


def test_no_test_imports_a_test_and_helpers_have_one_name():
    assert list_imported_tests(TESTS) == {}


def test_imports_of_tests_are_found(tmp_path):
    (tmp_path / "small_models.py").write_text("from tests.library.test_families import make_base\n")
    (tmp_path / "test_one.py").write_text("def test_it():\n    from small_models import trainable\n")
    (tmp_path / "test_two.py").write_text("from tests.helpers.small_models import trainable\nimport numpy.testing\n")
    found = list_imported_tests(sorted(tmp_path.iterdir()))
    assert {name: len(names) for name, names in found.items()} == {"small_models.py": 2, "test_one.py": 2}


def test_src_holds_exactly_its_five_files():
    names = {path.name for path in (REPOSITORY / "src").iterdir() if path.name != "__pycache__"}
    assert names == {"main.py", "train.py", "evaluate.py", "preprocess.py", "model.py"}


def test_imports_go_one_way():
    assert importers(LIBRARY, "fwlora.experiment") == [] == importers(LIBRARY + EXPERIMENT, "src")
    assert importers(PROGRAM, "src") == ["train.py"]
    assert importers(BENCHMARKS + TESTS_OF_PARTS, "src") == [] != TESTS_OF_PARTS
    # The rule above is worth something only if the helper sees imports that do exist.
    assert "train.py" in importers(PROGRAM, "fwlora.experiment")


def test_wandb_and_hydra_are_imported_in_one_place_each():
    store = {path.name for path in EXPERIMENT if path.parent.name == "wandb"}
    elsewhere = [path for path in EXPERIMENT if path.parent.name != "wandb"]
    assert importers(elsewhere + PROGRAM + LIBRARY, "wandb") == [] and store
    assert importers(EXPERIMENT, "hydra") == ["hydra_arguments.py"]
    assert "evaluate" not in (REPOSITORY / "src" / "main.py").read_text()


def test_only_listed_modules_depend_on_the_internals_of_peft():
    modules = LIBRARY + EXPERIMENT + PROGRAM
    names = sorted(p.name for p in modules if re.search(r"lora_[ABE]\b", p.read_text()))
    assert names == ["adalora.py", "adapters.py", "read_model.py", "triplet_scores.py"]
    assert sorted(importers(modules, "peft.tuners")) == ["adalora.py", "adapters.py", "read_model.py", "trainer.py"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fwlora", ["hydra", "wandb", "optuna", "transformers", "torch"]),
        ("fwlora.budget", ["torch", "peft", "transformers", "numpy"]),
        ("fwlora.adalora", ["hydra", "wandb", "optuna", "transformers.trainer", "datasets", "sklearn"]),
        ("fwlora.experiment.settings.hydra_arguments", ["torch", "wandb", "transformers", "optuna"]),
        ("fwlora.experiment.study.execution", ["torch", "wandb", "transformers", "optuna"]),
        ("fwlora.experiment.evaluation.evaluate", ["torch", "wandb", "transformers", "optuna", "hydra"]),
        ("fwlora.experiment.evaluation.figures.run", ["scipy", "pandas", "sklearn", "statsmodels"]),
        ("src.evaluate", ["numpy", "matplotlib", "pydantic"]),
        ("src.main", ["torch", "wandb", "transformers", "optuna"]),
        ("src.train", ["wandb", "datasets", "sklearn", "pandas"]),
    ],
)
def test_imports_are_light(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_exported_is_there():
    import fwlora

    assert all(getattr(fwlora, name) is not None for name in fwlora.__all__)
    assert fwlora.FisherWeightedLora.__module__ == "fwlora.regularizer"
    with pytest.raises(AttributeError, match="'fwlora' has no attribute 'Missing'"):
        _ = fwlora.Missing


def test_that_the_test_above_can_fail():
    code = "import sys, src.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_no_document_or_file_carries_a_download_address_or_this_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "uv.lock" not in listed.split()
    for name in listed.split():
        if name.endswith((".md", ".toml", ".yaml", ".cfg")):
            text = (REPOSITORY / name).read_text()
            assert not re.search(r"files\.pythonhosted|pypi\.org/simple|/work/|\.\./shared", text), name
