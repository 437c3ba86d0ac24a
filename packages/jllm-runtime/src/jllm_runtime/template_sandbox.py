"""Jinja's sandbox for chat templates: nothing of a template is computed before it is rendered.

Jinja computes constant expressions when it reads a template, in branches that are never taken, too. A template that
holds ``9 ** 999999999`` would stop whoever looks which variables it reads.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.meta import TrackingCodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jllm_runtime.generation_tag import GenerationTag


class _NothingComputed(CodeGenerator):
    """A code generator that leaves expressions to the rendering."""

    # What a constructor would set, and that of TrackingCodeGenerator does not.
    optimizer = property(lambda self: None, lambda self, value: None)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Frame) -> None:
        for keyword in node.options:
            self.writeline(f"context.eval_ctx.{keyword.key} = ")
            self.visit(keyword.value, frame)
        frame.eval_ctx.volatile = True


class _NameFinder(_NothingComputed, TrackingCodeGenerator):
    """Finds the names that a template reads."""


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for, with its functions and extensions, in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.code_generator_class = _NothingComputed
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes; it can fail in every way."""
    return make_environment().from_string(template).render(variables)


def names_read(template: str) -> set[str]:
    """The names that a template reads and does not set itself, without the sandbox's functions.

    Raises:
        TemplateError, RecursionError, ValueError: it cannot be parsed.
    """
    finder = _NameFinder(environment := make_environment())
    finder.visit(environment.parse(template))
    return finder.undeclared_identifiers


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes for HTML, which models have not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
