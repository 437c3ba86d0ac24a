"""Structured output: a text in, an object of a pydantic class out.

The class gives a JSON schema, the schema a grammar, and the engine lets the model choose only tokens that the grammar
allows. Whatever the model is, the answer is an object of the class. That what it says is true, nobody promises.

    pip install 'jllm-runtime[structured]' pydantic
    python examples/structured.py "Ada Lovelace was born in London in 1815."
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from jllm_core import JLLMError
from jllm_runtime import Engine, Grammar, load_chat_model
from pydantic import BaseModel, Field
from script import command_line, read_text, run


class Person(BaseModel):
    """What is asked about the text."""

    name: str = Field(max_length=40)
    city: str = Field(max_length=40)
    born: int = Field(ge=1000, le=2100)


def read_schema(path: Path) -> dict[str, Any]:
    """The JSON schema of an object, from a file."""
    try:
        schema: dict[str, Any] = json.loads(read_text(path))
        schema["properties"].keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise JLLMError(f"{path} is not a JSON schema of an object with properties: {error}") from error
    return schema


def main(args: argparse.Namespace) -> None:
    """Ask for the object, and print it."""
    schema = read_schema(args.schema) if args.schema else Person.model_json_schema()
    grammar = Grammar.json_schema(schema)
    model = load_chat_model(args.model)
    params = dataclasses.replace(model.chat_params(), max_tokens=args.max_tokens, grammar=grammar)
    question = f"{args.text}\nWrite what the text says as JSON with these fields: {', '.join(schema['properties'])}."
    with Engine(model) as engine:
        answer = engine.chat(question, params)
    if answer.finish_reason == "length":
        raise JLLMError(f"the object is longer than --max-tokens {args.max_tokens}: {answer.content}")
    if args.schema:
        print(json.dumps(json.loads(answer.content), indent=2, ensure_ascii=False))
    else:
        print(repr(Person.model_validate_json(answer.content)))


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("text", nargs="?", default="Ada Lovelace was born in London in 1815.", help="what to read")
    parser.add_argument("--schema", type=Path, help="a file with a JSON schema of an object, in place of the class")
    parser.add_argument("--max-tokens", type=int, default=96, help="most tokens of the object (default: %(default)s)")
    run(main, parser)
