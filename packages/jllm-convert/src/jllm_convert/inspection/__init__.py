"""Inspection of a model from its headers: contents, and problems that prevent a conversion."""

from jllm_convert.inspection.diagram import diagram
from jllm_convert.inspection.inspecting import inspect
from jllm_convert.inspection.report import Inspection

__all__ = ["Inspection", "diagram", "inspect"]
