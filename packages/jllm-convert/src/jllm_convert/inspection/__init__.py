"""What a model is and what would keep it from being converted, told from headers alone."""

from jllm_convert.inspection.inspecting import inspect
from jllm_convert.inspection.report import Inspection

__all__ = ["Inspection", "inspect"]
