"""What README shows runs as it stands there."""

from __future__ import annotations

import re

import torch
from transformers import AutoModelForSequenceClassification

from fwlora import FisherWeighting
from tests.helpers.family_models import make_base, make_inputs
from tests.helpers.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_loop_in_readme_trains(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    # The tiny model needs a larger part, and a warm-up that ends.
    code = code.replace("budget_percent=0.2", "budget_percent=12.0").replace("warmup_steps=500", "warmup_steps=3")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda name: make_base("roberta"))
    names: dict = {"loader": [make_inputs("roberta")] * 6}
    exec(code, names)
    importance = names["fw"].importance()
    assert len(importance) == 10 and abs(sum(importance.values()) - 1) < 1e-5
    assert all(norm > 0 for norm in names["fw"].norms().values())
    assert capsys.readouterr().out.startswith("{'roberta.encoder.layer.0.attention.self.query'")
    assert torch.isfinite(names["fw"].last_penalty)


def test_the_table_of_fields_says_the_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", README, flags=re.MULTILINE)
    shown = {name: default.strip("`") for name, default in rows if hasattr(FisherWeighting(), name)}
    defaults = {name: value for name, value in vars(FisherWeighting()).items() if name != "seed"}
    assert shown.keys() == defaults.keys()
    for name, value in defaults.items():
        assert (float(shown[name]) if isinstance(value, (int, float)) else shown[name]) == value
