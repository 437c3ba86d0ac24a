"""Model configs by name, folder or file."""

from pathlib import Path

from jllm_core import checkpoint
from jllm_core.config import ConfigError, ModelConfig

from jllm_runtime.errors import ModelError, PlanError
from jllm_runtime.planner.catalogue import PUBLISHED, find_published
from jllm_runtime.planner.suggestions import suggest


def find_config(name: str) -> tuple[str, ModelConfig]:
    """The name and the config of a model.

    Args:
        name: a checkpoint's folder, a model.json, the name of a published model (in any case, with or without its
            organisation), or anything that an installed resolver turns into a checkpoint.

    Raises:
        PlanError: an unknown model; the message suggests names.
        ConfigError: a model.json that describes no model.
    """
    path = Path(name)
    if checkpoint.is_checkpoint(path):
        return path.name, checkpoint.read_config(path)
    if path.is_file() and path.suffix == ".json":
        return path.stem, _read_json(path)
    # Before the resolvers, which might download the model.
    if published := find_published(name):
        return published.name, published.config

    from jllm_runtime.loading import resolve_model

    try:
        folder = resolve_model(name)
    except ModelError as error:
        # A folder that no resolver can read: its error says more than a list of names.
        if path.exists():
            raise
        raise PlanError(
            f"unknown model {name!r}: not a folder, nor known by name; {suggest(name, PUBLISHED)}"
        ) from error
    return name, checkpoint.read_config(folder)


def _read_json(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    except ConfigError as error:
        raise PlanError(f"{path} is not the model.json of a checkpoint: {error}") from error
