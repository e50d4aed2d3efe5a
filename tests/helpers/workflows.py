"""GitHub's workflows played on this machine: shell steps are run, actions have stand-ins.

A job starts in an empty folder with an empty environment. ``uv``, ``pip`` and ``sleep`` are stand-ins too: what they
would install is what runs the tests, and waiting shows nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import REPOSITORY

WORKFLOWS = REPOSITORY / ".github" / "workflows"
TOKEN = re.compile(r"\s*('(?:[^']|'')*'|&&|\|\||[!=]=|[!(),]|[A-Za-z_][\w.-]*|\d+)")
EXPRESSION = re.compile(r"\$\{\{((?:(?!\}\}).)*)\}\}")
PYTHON_WORDS = {"&&": " and ", "||": " or ", "!": " not ", "true": "True", "false": "False", "null": "None"}
SHELL = ("bash", "--noprofile", "--norc", "-e", "-o", "pipefail")
LONGEST_STEP_S = 240.0
STAND_INS = {
    "uv": f'case "$1" in sync) ;; run) shift; exec "{Path(sys.executable).parent}/$@" ;; *) exit 64 ;; esac',
    "pip": '[ "$*" = "install uv" ]',
    "sleep": ":",
}


def load_workflow(name: str) -> dict[str, Any]:
    """Read a workflow; YAML takes its key ``on`` for a truth value."""
    workflow = yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text())
    workflow["on"] = workflow.pop(True)
    return workflow


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """Return the value of what stands between ``${{`` and ``}}``; a name that is not there is empty."""
    tokens = TOKEN.findall(expression)
    assert not TOKEN.sub("", expression).strip(), f"cannot read {expression!r}"
    functions = {
        "fromJSON": json.loads,
        "always": lambda: True,
        "success": lambda: not contexts["failed"],
        "failure": lambda: contexts["failed"],
    }
    code = ""
    for place, token in enumerate(tokens):
        if token in PYTHON_WORDS:
            code += PYTHON_WORDS[token]
        elif re.match(r"[A-Za-z_]", token):
            is_call = tokens[place + 1 : place + 2] == ["("]
            code += token if is_call else f"look_up({token!r})"
        else:
            code += token
    return eval(code, {"__builtins__": {}}, {**functions, "look_up": lambda name: look_up(contexts, name)})


def look_up(contexts: Mapping[str, Any], name: str) -> Any:
    value: Any = contexts
    for part in name.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    return value


def fill(value: Any, contexts: Mapping[str, Any]) -> Any:
    """Return a part of a workflow with the values of its expressions."""
    if isinstance(value, Mapping):
        return {key: fill(content, contexts) for key, content in value.items()}
    if not isinstance(value, str):
        return value
    if whole := re.fullmatch(EXPRESSION, value):
        return evaluate(whole[1], contexts)
    return re.sub(EXPRESSION, lambda found: str(evaluate(found[1], contexts)), value)


@dataclass
class Job:
    """What became of a job.

    Attributes:
        name: as shown.
        workspace: its checkout.
        outcomes: ``success``, ``failure`` or ``skipped`` by the step's name.
        printed: by all its steps.
    """

    name: str
    workspace: Path
    outcomes: dict[str, str] = field(default_factory=dict)
    printed: str = ""

    @property
    def passed(self) -> bool:
        return "failure" not in self.outcomes.values()


@dataclass
class Service:
    """Stands for GitHub.

    Attributes:
        repository: that is checked out.
        folder: holds a machine for every job, and uploads below ``artifacts``.
        variables: of the repository.
        secrets: of the repository.
        machine: environment variables of every runner.
        watch: is given every line that a step prints.
    """

    repository: Path
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    watch: Callable[[str], None] = lambda line: None

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def dispatch(self, name: str, **given: str) -> list[Job]:
        """Play every job of a workflow with inputs as its form takes them, and its defaults."""
        workflow = load_workflow(name)
        form = workflow["on"]["workflow_dispatch"]["inputs"]
        assert given.keys() <= form.keys(), f"{name} has no such input"
        inputs = {key: given.get(key, rule.get("default", "")) for key, rule in form.items()}
        missing = [key for key, rule in form.items() if rule.get("required") and not inputs[key]]
        assert not missing, f"{name} requires {missing}"
        contexts = {
            "inputs": inputs, "vars": self.variables, "secrets": self.secrets, "github": {"run_id": "77"}
        }  # fmt: skip
        jobs = []
        for job in workflow["jobs"].values():
            matrix = fill(job.get("strategy", {}).get("matrix", {}), contexts)
            for combination in [{key: value} for key in matrix for value in matrix[key]] or [{}]:
                jobs.append(self._play(workflow, job, {**contexts, "matrix": combination}))
        return jobs

    def _play(self, workflow: dict[str, Any], job: dict[str, Any], contexts: dict[str, Any]) -> Job:
        machine = self.folder / f"{workflow['name']}-{sum(1 for _ in self.folder.iterdir())}"
        played = Job(fill(job["name"], contexts), machine / "work")
        (machine / "home").mkdir(parents=True)
        shell = {
            "PATH": f"{make_stand_ins(machine)}:/usr/local/bin:/usr/bin:/bin", "HOME": f"{machine / 'home'}",
            "CI": "true", **self.machine, **fill(job.get("env", {}), contexts),
        }  # fmt: skip
        steps: dict[str, dict[str, str]] = {}
        for step in job["steps"]:
            condition = str(step.get("if", "success()"))
            now = {**contexts, "steps": steps, "failed": not played.passed}
            if not evaluate(condition.removeprefix("${{").removesuffix("}}"), now):
                played.outcomes[step["name"]] = "skipped"
                continue
            if "uses" in step:
                self._act(step["uses"].partition("@")[0], fill(step.get("with", {}), now), played)
                succeeds = True
            else:
                assert not EXPRESSION.search(step["run"]), "an input is pasted into a shell line"
                succeeds = self._run(step["run"], {**shell, **fill(step.get("env", {}), now)}, played)
            played.outcomes[step["name"]] = "success" if succeeds else "failure"
        return played

    def _act(self, action: str, options: Mapping[str, Any], job: Job) -> None:
        if action == "actions/checkout":
            clone = ["git", "clone", "-q", "--branch", options["ref"], self.repository, job.workspace]
            subprocess.run(clone, check=True)
        elif action == "actions/upload-artifact":
            if (job.workspace / options["path"]).is_dir():  # else it warns
                shutil.copytree(job.workspace / options["path"], self.artifacts / options["name"])
        else:
            assert action == "actions/setup-python", f"no stand-in for {action}"

    def _run(self, script: str, environment: Mapping[str, str], job: Job) -> bool:
        with subprocess.Popen(
            [*SHELL, "-c", script], cwd=job.workspace, env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as started:  # fmt: skip
            assert started.stdout is not None
            for line in started.stdout:
                job.printed += line
                self.watch(line)
        return started.returncode == 0


def make_stand_ins(folder: Path) -> Path:
    """Write the stand-ins into a new folder ``bin``, for the start of PATH."""
    stand_ins = folder / "bin"
    stand_ins.mkdir(parents=True)
    for name, line in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/sh\n{line}\n")
        (stand_ins / name).chmod(0o755)
    return stand_ins


def make_clean_repository(folder: Path) -> Path:
    """Commit what git knows of this checkout, as it is now, to a new repository: its branch is ``main``."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q", "-b", "main"], ["add", "--all"], [*author, "commit", "-q", "-m", "a state"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder
