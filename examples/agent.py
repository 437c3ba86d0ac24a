"""A tool-using agent: the model calls Python functions until it can answer.

Each step of the model is JSON that a grammar holds it to: a call of one of the tools, or the answer. So the loop works
with any model, and always ends; whether the steps are wise is up to the model. Models that were trained for tool calls
also have them over the OpenAI API of `jllm serve` (`tools` and `tool_calls`).

    pip install 'jllm-runtime[structured]'
    python examples/agent.py "What is 1234 * 5678?"
"""

import argparse
import ast
import dataclasses
import datetime
import inspect
import json
import operator
from collections.abc import Callable, Mapping
from typing import Any

from jllm_core import JLLMError
from jllm_runtime import Engine, Grammar, load_chat_model
from script import command_line, run

Ask = Callable[[list[dict[str, str]], dict[str, Any]], str]
"""A model: messages and the JSON schema of its step, to the step's text."""

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
}
SIGNS: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# Small models go by what they see more than by what they are told.
EXAMPLE = [
    {"role": "user", "content": "How much is 20 plus 35?"},
    {"role": "assistant", "content": '{"tool":"calculate","arguments":{"expression":"20 + 35"}}'},
    {"role": "user", "content": "The result is 55."},
    {"role": "assistant", "content": '{"answer":"20 plus 35 is 55."}'},
]


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
            return SIGNS[type(node.op)](value(node.operand))
        raise ValueError(f"cannot compute {ast.unparse(node)!r}")

    return str(value(ast.parse(expression, mode="eval").body))  # never `eval`: the expression is a model's


def today() -> str:
    """The date of today."""
    return datetime.date.today().isoformat()


def step_schema(tools: Mapping[str, Callable[..., str]], may_answer: bool) -> dict[str, Any]:
    """The JSON schema of a step: a call of one of the tools, or the answer where it may be given."""

    def exactly(**fields: Any) -> dict[str, Any]:
        return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}

    text = {"type": "string", "maxLength": 200}
    calls = [
        exactly(tool={"const": name}, arguments=exactly(**dict.fromkeys(inspect.signature(tool).parameters, text)))
        for name, tool in tools.items()
    ]
    return {"anyOf": [*calls, *([exactly(answer=text)] if may_answer else [])]}


def run_agent(ask: Ask, question: str, tools: Mapping[str, Callable[..., str]], max_steps: int) -> str:
    """Let the model call tools until it answers; in its last step it can do nothing else."""
    lines = [f"{name}{inspect.signature(tool)}: {tool.__doc__}" for name, tool in tools.items()]
    system = "You answer questions with tools. Write one step as JSON: a tool call or the answer. The tools:\n"
    system += "\n".join(lines)
    messages = [{"role": "system", "content": system}, *EXAMPLE, {"role": "user", "content": question}]
    for number in range(1, max_steps + 1):
        # First a tool, as with `tool_choice: "required"`: small models would rather guess. Last the answer.
        schema = step_schema(tools if number < max_steps else {}, may_answer=number > 1 or max_steps == 1)
        text = ask(messages, schema)
        messages.append({"role": "assistant", "content": text})
        try:
            step = json.loads(text)
            if "answer" in step:
                return str(step["answer"])
            result = tools[step["tool"]](**step["arguments"])
        except Exception as error:  # the model's mistake, which the model is told
            result = f"error: {type(error).__name__}: {error}"
        print(f"{number}. {text} -> {result}", flush=True)
        messages.append({"role": "user", "content": f"The result is {result}."})
    return "(no answer)"


def main(args: argparse.Namespace) -> None:
    """Ask the question."""
    if args.max_steps < 1:
        raise JLLMError(f"--max-steps must be at least 1, the answer, got {args.max_steps}")
    model = load_chat_model(args.model)
    with Engine(model) as engine:

        def ask(messages: list[dict[str, str]], schema: dict[str, Any]) -> str:
            params = dataclasses.replace(model.chat_params(), max_tokens=256, grammar=Grammar.json_schema(schema))
            return engine.chat(messages, params).content

        print(run_agent(ask, args.question, {"calculate": calculate, "today": today}, args.max_steps))


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("question", nargs="?", default="What is 1234 * 5678?", help="default: %(default)r")
    parser.add_argument("--max-steps", type=int, default=5, help="the last one is the answer (default: %(default)s)")
    run(main, parser)
