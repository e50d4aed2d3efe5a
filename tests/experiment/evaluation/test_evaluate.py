"""``python -m src.evaluate``: arguments, errors, and a whole evaluation of runs that W&B wrote offline."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import psutil
import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.compare.cells import PairChoice
from fwlora.experiment.evaluation.evaluate import clean_up, collect_records, find_stale_figures, write_results
from fwlora.experiment.evaluation.request import parse_request
from fwlora.experiment.tracking import RecordSource
from fwlora.experiment.tracking.records import UnreadableRunsError
from fwlora.experiment.tracking.wandb import WandbSettings
from fwlora.experiment.tracking.wandb.reading import WandbSource
from tests.helpers import evaluation_records as records
from tests.helpers.paths import REPOSITORY as ROOT

PROPOSED = "proposed-roberta-base-110M--SST-2-GLUE"
BASELINE = "comparative-1-roberta-base-110M--SST-2-GLUE"
UNFINISHED = "comparative-2-unfinished"


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("wandb: {entity: file-entity, project: file-project}\nrun: ???\nother: ${missing}\n")
    return path


def evaluate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "src.evaluate", *arguments],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def load_program():
    """``src/evaluate.py`` in this process."""
    spec = importlib.util.spec_from_file_location("src_evaluate", ROOT / "src" / "evaluate.py")
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs and one that ended with an error, as W&B itself writes them offline."""
    import wandb

    folder = tmp_path_factory.mktemp("results = with space")
    given = {
        PROPOSED: records.make_record(PROPOSED, "proposed_fw_lora", modules=True),
        BASELINE: records.make_record(BASELINE, "baseline_lora", error_rate=0.15),
        UNFINISHED: records.make_record(UNFINISHED, "adalora"),
    }
    for run_id, record in given.items():
        (folder / run_id).mkdir()
        run = wandb.init(
            entity="e",
            project="p",
            id=run_id,
            mode="offline",
            dir=folder / run_id,
            config=dict(record.config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        for row in record.history:
            run.log(dict(row))
        if run_id == UNFINISHED:
            run.finish(exit_code=1)
            continue
        for key, value in record.summary.items():
            run.summary[key] = value
        run.finish()
    return folder


def test_entity_and_project_come_from_command_line_then_environment_then_file(config_path: Path):
    arguments = ["results_dir=a=b", 'run_ids=["x", "y"]']
    request = parse_request(arguments, {}, config_path)
    assert (str(request.results_dir), request.run_ids, request.source) == ("a=b", ("x", "y"), "auto")
    assert request.tracker_settings == WandbSettings(entity="file-entity", project="file-project")
    environment = {"WANDB_ENTITY": "env-entity", "WANDB_PROJECT": "env-project"}
    request = parse_request([*arguments, "wandb.entity=cli-entity"], environment, config_path)
    assert request.tracker_settings == WandbSettings(entity="cli-entity", project="env-project")


def test_the_repository_configuration_names_entity_and_project():
    request = parse_request(["results_dir=r", 'run_ids=["x"]'], {}, ROOT / "config" / "config.yaml")
    assert request.tracker_settings == WandbSettings(entity="gengaru617-personal", project="251106-test")


def test_an_empty_results_dir_means_the_configured_one(config_path: Path):
    arguments = ["results_dir=", 'run_ids=["x"]']
    request = parse_request(arguments, {}, ROOT / "config" / "config.yaml")
    assert request.results_dir == Path(".research/results")
    assert parse_request(arguments, {"RESULTS_DIR": "mounted"}, config_path).results_dir == Path("mounted")
    config_path.write_text(config_path.read_text() + "results_dir: elsewhere\n")
    assert parse_request(arguments, {}, config_path).results_dir == Path("elsewhere")


STEPS = r"""
run_ids='["a", "b-0.1"]'
run_ids="[\"a\", \"b-0.1\"]"
run_ids=["a","b-0.1"]
run_ids=["a", "b-0.1"]
run_ids="['a', 'b-0.1']"
run_ids=$'[\n  "a",\n  "b-0.1"\n]\n'
run_ids='"[\"a\", \"b-0.1\"]"'
run_ids='[\"a\", \"b-0.1\"]'
run_ids="'[\"a\", \"b-0.1\"]'"
run_ids="$RUN_IDS"
"""
SHOW_ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.mark.parametrize("step", STEPS.split("\n")[1:-1])
def test_run_ids_survive_every_quoting_of_a_shell_step(config_path: Path, step: str):
    shown = subprocess.run(
        ["bash", "-c", f'"$PYTHON" -c "$SHOW" {step}'],
        env={"PYTHON": sys.executable, "SHOW": SHOW_ARGUMENTS, "RUN_IDS": '["a", "b-0.1"]'},
        stdout=subprocess.PIPE,
        check=True,
    )
    request = parse_request(["results_dir=r", *json.loads(shown.stdout)], {}, config_path)
    assert request.run_ids == ("a", "b-0.1")


@pytest.mark.parametrize(
    ("run_ids", "expected"),
    [
        ("[a b]", "is not JSON"),
        ("[a,]", "is not JSON"),
        ("[{a}]", "is not JSON"),
        ('"a"', "is not a JSON list of strings"),
        ('["a", 1]', "is not a JSON list of strings"),
        ("[]", "run_ids is empty"),
        ('["a", "b", "a"]', "names 'a' 2 times"),
        ('["../a"]', "'../a' is no run id"),
        ('["a\\\\b"]', "is no run id"),
        ('[".."]', "'..' is no run id"),
        ('[""]', "'' is no run id"),
        ('["comparison"]', "is the folder of the comparison"),
    ],
)
def test_bad_run_ids_are_refused(config_path: Path, run_ids: str, expected: str):
    with pytest.raises(UserError) as raised:
        parse_request(["results_dir=r", f"run_ids={run_ids}"], {}, config_path)
    assert expected in str(raised.value)


def test_all_bad_arguments_are_reported_at_once():
    done = evaluate("--run", "color=red", "source=ftp", "source=api", 'run_ids=["a/b"]')
    assert (done.returncode, done.stdout) == (2, "")
    for expected in (
        "'--run' is not of the form key=value",
        "'color' is unknown",
        "source is given twice",
        "results_dir is missing",
        "'a/b' is no run id",
        "source is 'ftp'",
    ):
        assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_configuration_file_matters_only_where_it_is_needed(tmp_path: Path):
    arguments = ["results_dir=r", 'run_ids=["x"]']
    expected = r"absent\.yaml cannot be read: No such file or directory; give wandb\.entity=<value> and wandb\."
    with pytest.raises(UserError, match=expected):
        parse_request(arguments, {}, tmp_path / "absent.yaml")
    parse_request([*arguments, "wandb.entity=e", "wandb.project=p"], {}, tmp_path / "absent.yaml")


def test_unreadable_and_incomparable_runs_are_named_together():
    class Source(RecordSource):
        def load(self, run_ids):
            if "gone" in run_ids:
                raise UnreadableRunsError({"gone": "no files (there are `unfinished`: 3)"})
            return [records.change(records.make_record(run_id), state="failed") for run_id in run_ids]

    with pytest.raises(UserError) as raised:
        collect_records(Source(), ["gone", "unfinished"])
    assert "`gone`: no files" in str(raised.value) and "run 'unfinished' is unfinished" in str(raised.value)


def test_evaluation_end_to_end(results_dir: Path):
    done = evaluate(f"results_dir={results_dir}", f'run_ids=["{PROPOSED}", "{BASELINE}"]', "source=files")
    assert done.returncode == 0, done.stderr
    printed = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(results_dir))]
    assert all(path.is_file() and path.stat().st_size > 0 for path in printed)
    written = {path for path in results_dir.rglob("*") if path.is_file() and "wandb" not in path.parts}
    assert written == set(printed)
    names = [path.name for path in printed if path.suffix == ".pdf"]
    assert len(names) == len(set(names)) == 11
    folders = [path.relative_to(results_dir).parts[0] for path in printed]
    assert folders == sorted(folders, key=[PROPOSED, BASELINE, "comparison"].index)
    documents = [path.name for path in printed if path.parent.parent == results_dir and path.suffix != ".pdf"]
    assert sorted(documents) == ["aggregated_metrics.json", "metrics.json", "metrics.json"]
    (page,) = results_dir.glob("comparison/report/report.html")
    addresses = re.findall(r'href="([^"#]+\.pdf)"', page.read_text())
    assert {(page.parent / unquote(address)).resolve() for address in addresses} == {
        path.resolve() for path in printed if path.suffix == ".pdf"
    }
    table = done.stdout.splitlines()[: -len(printed)]
    assert table[0].split()[:2] == ["cell", "method"]
    assert "FW-LoRA" in table[2]

    aggregated = json.loads((results_dir / "comparison" / "aggregated_metrics.json").read_text())
    expected = records.make_record(PROPOSED, "proposed_fw_lora", modules=True).summary["final_eval_accuracy"]
    assert aggregated["best_proposed"] == {"run_id": PROPOSED, "value": expected}
    assert aggregated["gap"] == expected - aggregated["metrics"]["eval_accuracy"][BASELINE]
    own = json.loads((results_dir / PROPOSED / "metrics.json").read_text())
    assert [row["epoch"] for row in own["epochs"]] == [1, 2, 3]
    assert sum(map(sum, own["confusion_matrix"]["counts"])) == 400
    assert own["settings"]["fw_lora"]["warmup_steps"] == 10
    assert len(own["modules"]["names"]) == 59
    assert "eval_predictions" not in own["summary"]
    history = json.loads((results_dir / PROPOSED / "report" / "history.json").read_text())["history"]
    assert [row["global_step"] for row in history] == list(range(1, 61))


def test_nothing_is_written_where_a_run_is_missing_or_unfinished(results_dir: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(results_dir.rglob("*"))
    arguments = [f"results_dir={results_dir}", f'run_ids=["{UNFINISHED}", "absent"]', "source=files"]
    with pytest.raises(SystemExit) as ended:
        load_program().main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "`absent`" in printed.err and f"'{UNFINISHED}' is unfinished" in printed.err
    assert sorted(results_dir.rglob("*")) == before


def test_nothing_is_written_where_a_metric_is_not_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    program = load_program()
    broken = records.change(records.make_record("b"), summary__final_eval_accuracy=float("nan"))
    good = records.make_record("p", "proposed_fw_lora")
    monkeypatch.setattr(WandbSource, "load", lambda source, run_ids: [good, broken])
    with pytest.raises(SystemExit) as ended:
        program.main([f"results_dir={tmp_path}", 'run_ids=["p", "b"]'])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "run 'b' has final_eval_accuracy = nan" in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_results_dir_that_cannot_be_written_is_an_error(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"results_dir: cannot write .*give a writable results_dir"):
        write_results({blocked / "run" / "metrics.json": b"{}"})


def test_figures_of_an_earlier_evaluation_are_removed_and_no_file_of_others(tmp_path: Path):
    folder = tmp_path / "comparison"
    kept, stale, others = (folder / f"comparison_{name}.pdf" for name in ("a", "b", "of_a_user"))
    manifest = folder / "report" / "figures.json"
    abandoned, under_way = folder / ".a.0123.partial", folder / ".b.0123.partial"
    write_results({
        **dict.fromkeys((kept, stale, others, abandoned, under_way), b"x"),
        manifest: json.dumps({"figures": [kept.name, stale.name, "../../precious.pdf", "notes.txt"]}).encode(),
        tmp_path / "precious.pdf": b"x", folder / "notes.txt": b"x",
    })  # fmt: skip
    os.utime(abandoned, (0, 0))
    files = {kept: b"y", manifest: b'{"figures": ["comparison_a.pdf"]}'}
    found = find_stale_figures(files)
    assert found == [stale]
    write_results(files)
    clean_up(files, found)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [under_way.name, kept.name, others.name, "notes.txt", "report"]
    assert (tmp_path / "precious.pdf").exists()
    for content in (b"", b"[" * 5_000, b'{"figures": 3}', b'{"figures": [3]}'):
        manifest.write_bytes(content)
        assert find_stale_figures(files) == []


def test_a_reader_that_stops_reading_and_a_terminal_without_quotes_are_no_errors(results_dir: Path):
    arguments = [f"results_dir={results_dir}", f'run_ids=["{BASELINE}"]', "source=files"]
    with subprocess.Popen(
        [sys.executable, "-m", "src.evaluate", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    ) as started:  # fmt: skip
        started.stdout.close()
        assert started.stderr.read() == b"" and started.wait() == 0
    done = evaluate(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "it rests on ?AdaLoRA" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_drawing_processes_end_with_the_one_that_started_them(tmp_path: Path, number: int, expected: int):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from tests.helpers.evaluation_records import make_record\n"
        "from fwlora.experiment.errors import user_errors_exit\n"
        "from fwlora.experiment.evaluation.figures.draw import draw_figures\n"
        "from fwlora.experiment.evaluation.evidence import gather_evidence\n"
        "if __name__ == '__main__':\n"
        "    given = [make_record(f'{m}{s}', m, s) for s in range(40) for m in ('baseline_lora', 'adalora')]\n"
        "    evidence = gather_evidence(given, {}, resamples=20)\n"
        "    print('drawing', flush=True)\n"
        "    with user_errors_exit():\n"
        "        draw_figures(evidence, workers=2)\n"
    )
    paths = str(ROOT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    ) as started:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        assert started.stdout.readline() == "drawing\n"
        process, deadline = psutil.Process(started.pid), time.monotonic() + 60
        while len(children := process.children()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2.0)
        started.send_signal(number)
        asked = time.monotonic()
        errors = started.stderr.read()
        assert started.wait(timeout=30) == expected and time.monotonic() - asked < 15
    assert len(children) >= 3 and psutil.wait_procs(children, timeout=10)[1] == []
    assert "Traceback" not in errors


def test_writing_leaves_no_temporary_files(tmp_path: Path):
    target = tmp_path / "run" / "metrics.json"
    write_results({target: b"old"})
    write_results({target: b"new"})
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]
    target.unlink()
    target.mkdir()
    with pytest.raises(UserError):
        write_results({target: b"new"})
    assert list(target.parent.iterdir()) == [target]


def test_the_pairs_that_are_compared_can_be_chosen(config_path):
    arguments = ["results_dir=~/r", 'run_ids=["x"]']
    usual = parse_request(arguments, {}, config_path)
    assert usual.pairs == PairChoice("lora", every=False) and usual.results_dir == Path("~/r").expanduser()
    chosen = parse_request([*arguments, "reference=adalora", "pairs=all"], {}, config_path)
    assert chosen.pairs == PairChoice("adalora", every=True)
    with pytest.raises(UserError) as caught:
        parse_request([*arguments, "reference=qlora", "pairs=some"], {}, config_path)
    for told in ("reference is 'qlora'; one of lora, adalora, proposed", "pairs is 'some'; one of reference, all"):
        assert told in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5_000, "[" + "9" * 5_000 + "]", '["' + "a" * 100_000])
def test_lists_that_no_reader_takes_are_refused_in_a_line(text, config_path):
    with pytest.raises(UserError, match=r"run_ids=.* is not JSON|is longer than 128 bytes") as caught:
        parse_request(["results_dir=r", f"run_ids={text}"], {}, config_path)
    assert len(str(caught.value)) < 600
