"""Model families: tables of matching rules, one file for each group of relatives."""

from jllm_core.config import ModelConfig

from jllm_convert.families import llama, qwen, qwen_hybrid
from jllm_convert.families.table import Family

_LLAMAS = (llama.LLAMA, llama.MISTRAL, llama.SMOLLM3)
_QWENS = (qwen.QWEN2, qwen.QWEN2_MOE, qwen.QWEN3, qwen.QWEN3_MOE, qwen.QWEN3_VL, qwen.QWEN3_VL_MOE)
_HYBRIDS = (qwen_hybrid.QWEN3_NEXT, qwen_hybrid.QWEN3_5, qwen_hybrid.QWEN3_5_MOE)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*_LLAMAS, *_QWENS, *_HYBRIDS)}
"""Every supported family, by the ``model_type`` of its config.json."""


def family_of(model_type: object) -> Family | None:
    """The family of a ``model_type``, be it that of a whole config.json or of a text model alone; None for others."""
    for family in FAMILIES.values():
        if model_type in (family.model_type, family.text_model_type) and model_type is not None:
            return family
    return None


def exported_family(config: ModelConfig) -> Family:
    """The family that a checkpoint is exported as: its own, or one with the same text model."""
    own = FAMILIES[config.model_type]
    return FAMILIES[own.exported_as] if own.exported_as else own
