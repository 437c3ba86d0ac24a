"""Model families: tables of matching rules, one file for each group of relatives."""

from jllm_convert.families import llama, qwen
from jllm_convert.families.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (llama.LLAMA, llama.MISTRAL, llama.SMOLLM3, qwen.QWEN2, qwen.QWEN3, qwen.QWEN3_MOE)
}
"""Every supported family, by the ``model_type`` of its config.json."""
