"""Saving a model: its weights, tokenizer and settings as a checkpoint."""

import json
from pathlib import Path

from jllm_core import checkpoint

from jllm_runtime.__about__ import __version__
from jllm_runtime.model import Model


def save_model(model: Model, path: Path, overwrite: bool) -> None:
    """Save a model; arguments and errors are those of ``Model.save``.

    All of it comes from memory: the folder that it was loaded from may be gone, and its parts may have been replaced.
    """
    files = model.tokenizer.files() if model.tokenizer else {}
    # All ids, also those that the tokenizer alone named: who loads the checkpoint must stop where this model does.
    settings = {**model.generation_config, **({"eos_token_id": list(model.eos_ids)} if model.eos_ids else {})}
    files[checkpoint.GENERATION_FILE] = json.dumps(settings, indent=2) + "\n"
    checkpoint.save_checkpoint(
        path,
        model.config,
        model.weights,
        files={name: text.encode() for name, text in files.items()},
        source={"name": model.path.name if model.path else model.config.model_type, "kind": "saved"},
        created_by=f"jllm-runtime {__version__}",
        overwrite=overwrite,
    )
