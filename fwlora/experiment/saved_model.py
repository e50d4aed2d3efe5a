"""What a full run saves: a folder that transformers loads as a whole model, with labels, and PEFT as an adapter.

``pipeline("text-classification", model=folder)`` answers with the names of the classes. Beside the adapter lie the base
model's configuration and weights, as hard links where the file system allows them, so that they take no room.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fwlora.experiment.files import replace_folder
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.modeling.build import AdaptedModel
from fwlora.experiment.modeling.pretrained import PACKAGE_PREFIX, find_weight_files
from fwlora.experiment.paths import is_path
from fwlora.experiment.settings.schema import RunSettings
from fwlora.experiment.tracking.facts import RunFacts

CARD = """\
---
{header}
---

# {run_id}

{method} on {data}, trained by fwlora.

```python
from transformers import pipeline

pipeline("text-classification", model="<this folder>")("…")
```

The folder holds the whole model: `adapter_*` is what was trained, the other weights are those of {base}, unchanged.
`PeftModel.from_pretrained(base, "<this folder>")` loads the adapter alone.

| | |
|---|---|
{rows}

The value is of one run with one seed; `python -m src.evaluate` gives intervals over several.

```yaml
{settings}```
"""


def save_model(
    adapted: AdaptedModel, tokenizer: Any, run: RunSettings, facts: RunFacts, final_value: float, folder: Path
) -> None:
    """Save model, tokenizer and model card, all or nothing.

    Args:
        adapted: the trained model.
        tokenizer: of the base model.
        run: the node ``run``.
        facts: of the run.
        final_value: of the primary metric, after the last epoch.
        folder: to be replaced.
    """
    model: Any = adapted.model
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if facts.label_names:
        base.config.id2label = dict(enumerate(facts.label_names))
        base.config.label2id = {name: place for place, name in enumerate(facts.label_names)}
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = run.model.pretrained_id
        config.revision = run.model.revision

    def fill(partial: Path) -> None:
        adapted.method.save(model, partial)
        _forget_last_call(tokenizer)
        tokenizer.save_pretrained(partial)
        if base is not model:
            base.config.save_pretrained(partial)
            for file in find_weight_files(run.model.pretrained_id, run.model.revision):
                _link_or_copy(file, partial / file.name)
        (partial / "README.md").write_text(write_card(run, facts, final_value), encoding="utf-8")

    replace_folder(folder, fill)


def _forget_last_call(tokenizer: Any) -> None:
    """Let a fast tokenizer neither cut nor pad: it saves what its last call asked for, if this process made one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def write_card(run: RunSettings, facts: RunFacts, final_value: float) -> str:
    """Write the model card: method, data with fingerprints, result, command, versions and settings."""
    import yaml

    base = run.model.pretrained_id
    data = " ".join(filter(None, (run.dataset.name, run.dataset.subset)))
    header: JsonObject = {
        "library_name": "peft" if run.model.lora.enabled else "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["fwlora", run.method],
        "metrics": [str(facts.primary_metric).removeprefix("eval_")],
    }
    if not (base.startswith(PACKAGE_PREFIX) or is_path(base) or Path(base).is_dir()):
        header["base_model"] = base
    environment: JsonMapping = facts.environment
    packages = environment.get("packages")
    versions = (
        ", ".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else ""
    )
    rows = {
        "method": run.method,
        "base model": base + (f" at {run.model.revision}" if run.model.revision else ""),
        "training split": (
            f"{run.dataset.split}, {facts.train_examples:,} examples, fingerprint {facts.train_fingerprint}"
        ),
        "evaluation split": (
            f"{run.dataset.eval_split}, {facts.eval_examples:,} examples, fingerprint {facts.eval_fingerprint}"
        ),
        "classes": ", ".join(facts.label_names) or "none: it predicts a number",
        f"{facts.primary_metric}, last epoch": f"{final_value:.4f}",
        "seed": run.training.seed,
        "command": f"`{facts.command}`" if facts.command else "not recorded",
        "versions": versions or "not recorded",
    }
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False).rstrip(),
        run_id=run.run_id,
        method=run.method,
        data=data,
        base=base,
        rows="\n".join(f"| {name} | {_escape(str(value))} |" for name, value in rows.items()),
        settings=yaml.safe_dump(json.loads(run.model_dump_json()), sort_keys=False, allow_unicode=True),
    )


def _escape(text: str) -> str:
    """Keep a text inside its cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
