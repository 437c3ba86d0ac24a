"""Model ids of the Hugging Face hub: owner/name, or owner/name/file.gguf."""

import os
from dataclasses import dataclass

from jllm_convert.errors import ConversionError
from jllm_convert.hub.remote_file import stays_inside


@dataclass(frozen=True)
class ModelId:
    """A model's name on the hub.

    Attributes:
        repo: the repository, ``owner/name``.
        file: the path of a GGUF file in it; None is the repository's own model.
    """

    repo: str
    file: str | None

    @classmethod
    def parse(cls, text: str) -> "ModelId":
        """Parse a model id.

        Raises:
            ConversionError: it is none.
        """
        owner, _, rest = text.partition("/")
        name, _, file = rest.partition("/")
        problem = "it has no owner and name" if not (owner and name) else _name_problem(f"{owner}/{name}")
        if not problem and name.lower().endswith(".gguf"):
            problem = "a .gguf file is in a repository, which has an owner and a name"
        elif not problem and rest != name:
            names_file = file.lower().endswith(".gguf") and all(part not in ("", ".") for part in file.split("/"))
            problem = "" if names_file and stays_inside(file) else f"{file!r} is not the name of a .gguf file"
        if problem:
            raise ConversionError(
                f"{text!r} is not a model id of the hub: {problem}; expected owner/name, or owner/name/file.gguf"
            )
        return cls(f"{owner}/{name}", file or None)

    def __str__(self) -> str:
        return self.repo if self.file is None else f"{self.repo}/{self.file}"


def _name_problem(repo: str) -> str:
    """The objection of huggingface_hub to the name of a repository; empty where it is well formed."""
    if not repo.isascii():  # its release 1 takes all letters that Python knows
        return "it has other characters than letters from a to z, digits, '-', '_' and '.'"
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return str(error).rstrip(".")
    return ""


def looks_like_id(text: str) -> bool:
    """Whether ``text`` has the form of a model id, and no file or folder here has that name."""
    try:
        ModelId.parse(text)
    except ConversionError:
        return False
    return not os.path.lexists(text)
