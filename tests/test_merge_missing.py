"""A tensor that too few models have for a method to work on is refused before the work, whatever the policy."""

from __future__ import annotations

import pytest
import torch
from conftest import CheckpointMaker

from weightworks.errors import MethodError
from weightworks.plan.merge import run_merge
from weightworks.stage.settings import Settings


@pytest.mark.parametrize("name", ["slerp", "model_stock"])
def test_too_few_models_have_a_tensor(make_checkpoint: CheckpointMaker, name: str) -> None:
    both = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}
    folders = [make_checkpoint(both, name="one"), make_checkpoint({"a": torch.ones(4, 4)}, name="two")]
    base = {"base": str(make_checkpoint(both, name="base"))} if name == "model_stock" else {}
    options = {"on_missing": "skip-model", "check": "files"}
    with pytest.raises(MethodError, match=rf"b: only in .*one, and merge.{name} takes at least 2 models"):
        run_merge(name, [str(folder) for folder in folders], options, Settings(), dry_run=True, **base)
