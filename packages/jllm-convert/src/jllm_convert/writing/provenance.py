"""Provenance of a checkpoint: the manifest's entry of the source that it was made from."""

from collections.abc import Sequence
from pathlib import Path

from jllm_convert.hub.downloading import origin
from jllm_convert.sources.base import IGNORED_FIELDS, Source
from jllm_convert.sources.checkpoint import CheckpointSource
from jllm_convert.sources.left_out import LEFT_OUT
from jllm_convert.sources.peft_adapter import ADAPTER
from jllm_convert.writing.float32_arrays import FLOAT32_SOURCES, float32_arrays, float32_sources
from jllm_convert.writing.plan import ConversionPlan

FINGERPRINT = "fingerprint"
"""The key of a manifest's source: the hash of the names, sizes, times and headers of the files that were read."""


def described_source(src: Path, source: Source, plan: ConversionPlan, ignored: Sequence[str]) -> dict[str, object]:
    """The manifest's entry of a source: name, kind, element type if there is one plain one, repository and commit."""
    described: dict[str, object] = {"name": src.resolve().name, "kind": source.naming}
    if ignored:
        described[IGNORED_FIELDS] = list(ignored)
    if source.left_out:
        described[LEFT_OUT] = dict(source.left_out)
    # By which ``exist_ok`` knows it again. Not plan.fingerprint: that is of this version of the package too.
    described[FINGERPRINT] = source.fingerprint()
    # Export returns to these types. Of quantised, mixed or adapted ones it could not restore the bits, so none is
    # recorded.
    fixed = float32_arrays(plan.config)
    stored = {part.tensor.stored for match in plan.matches if match.array not in fixed for part in match.parts}
    if plan.adapter is not None:
        described[ADAPTER] = plan.adapter.described()
    elif len(stored) == 1 and stored <= {"F32", "F16", "BF16"}:
        described["dtype"] = next(match.dtype.name for match in plan.matches if match.array not in fixed)
    # Of a checkpoint, those of the folder that it was made from itself.
    before = source.source if isinstance(source, CheckpointSource) else {}
    kept = float32_sources(plan.matches, fixed) if source.naming == "hf" else before.get(FLOAT32_SOURCES)
    if kept:
        described[FLOAT32_SOURCES] = kept
    published = origin(src)
    if published is None:
        return described
    # A folder in the hub's cache is named by a commit, so the repository's name is the better one.
    file = {"file": src.name} if source.naming == "gguf" else {}
    return {**described, "name": published["repo"], **published, **file}
