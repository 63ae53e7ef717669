"""What goes beside a model's weights, in an artifact and in a checkpoint alike."""

from __future__ import annotations

import json
from pathlib import Path

from transom.zoo.generation import GENERATION
from transom.zoo.model import Model
from transom.zoo.tokenizer import TOKENIZER
from transom.zoo.tokenizer_config import CONFIG, TEMPLATE

COMPANIONS = frozenset({TOKENIZER, CONFIG, TEMPLATE, GENERATION})
"""Names of the files that `write_companions` may write; they do not depend on how weights are stored."""


def write_companions(model: Model, folder: Path) -> None:
    """Write the tokenizer, its chat template, and how text is generated: what a model's source says of them."""
    bos_id = None
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
        bos_id = model.tokenizer.bos_id
    (folder / GENERATION).write_text(json.dumps(model.generation.to_json(bos_id), indent=1) + "\n")
