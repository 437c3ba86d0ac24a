"""Engine configuration: sizes and limits."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jllm_runtime.cache.contiguous import KV_DTYPES, PREFILL_CHUNK, KVDtype, cache_dtype
from jllm_runtime.cache.paged import chunk_pages, least_page_size
from jllm_runtime.cache.snapshots import StateSnapshots
from jllm_runtime.engine.pool_size import device_page_bytes, pool_pages, pool_snapshots
from jllm_runtime.errors import EngineError
from jllm_runtime.model import Model
from jllm_runtime.programs.contiguous_batch import DECODE_BLOCK

OPTIONAL_SIZES = ("snapshots", "pages", "chunk_tokens", "step_tokens", "max_queue")
"""Fields of an EngineConfig that may be None."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of an engine.

    Attributes:
        max_batch: most sequences (answers) that are computed at a time; others wait.
        page_size: tokens in a page of the cache, which is what prompts share, and what is computed to the same bits by
            whoever has it first. The same prompt has the same bits only with the same size. On TPUs at least 128 where
            heads are no multiple of 128 wide, and with int8; on accelerators at least 256 for models with delta nets.
        chunk_tokens: tokens of prompts that one program takes: whole pages side by side, of one prompt or of several.
            None takes what keeps the device busy (512 or more on accelerators), and one page where the backend would
            have to gather every page of a text to attend to it, as on a CPU, and for models with delta nets, whose
            programs take one page of each prompt.
        snapshots: copies of the states of delta nets behind pages of prompts, from which prompts that begin alike go
            on; without any, such a model computes every prompt in full. None takes one for each row, at least
            four, and at most a quarter of the memory that is free for the cache. 0 in other models.
        pages: pages of the cache. None takes what the free memory of the device holds (``pool_size``), and at most what
            ``max_batch`` texts as long as the context need.
        step_tokens: most prompt tokens that are computed in one step of the engine, before its decode: who waits for a
            token waits so much longer. None is one chunk.
        decode_steps: most tokens of each sequence in one step of the engine.
        batch_sizes: numbers of rows that programs are compiled for, the last at least ``max_batch``. None takes those
            among which a row is computed to the same bits: on a CPU powers of two, from 1 where our kernels run, else
            from where XLA's reductions have one order (4 for a width of 1,024); elsewhere ``max_batch`` alone. Smaller
            ones answer a lone request sooner on a CPU, and may round it otherwise than among others.
        max_queue: most sequences that may wait; None is no limit.
        kv_dtype: dtype of cached keys and values: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` (with a
            scale for each token and head); that of the activations when None, but float32 in place of bfloat16 where
            XLA computes on a CPU, which is many times faster. Fewer bits make room for more pages, and change the
            answers a little.
        warm_up: compile the programs before the first request, and fit the pages to the memory that they leave. None
            does so on accelerators, where a program takes half a minute to compile. Over several processes the pages
            are not fitted. On a CPU, longer texts than 256 tokens have programs of their own, which are left out.

    Raises:
        EngineError: a value that is impossible.
    """

    max_batch: int = 16
    page_size: int = PREFILL_CHUNK
    pages: int | None = None
    snapshots: int | None = None
    chunk_tokens: int | None = None
    step_tokens: int | None = None
    decode_steps: int = 4
    batch_sizes: tuple[int, ...] | None = None
    max_queue: int | None = None
    kv_dtype: KVDtype | None = None
    warm_up: bool | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("max_batch", "page_size", "decode_steps", *OPTIONAL_SIZES), 1) | {"snapshots": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL_SIZES:
                continue
            # A bool is an int in Python, and `pages=True` is a mistake.
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise EngineError(f"{name} must be a whole number, {lowest} or above, got {value!r}")
        if self.page_size & (self.page_size - 1):
            raise EngineError(f"page_size must be a power of two, got {self.page_size}")
        if self.decode_steps > DECODE_BLOCK:
            raise EngineError(f"decode_steps must be at most {DECODE_BLOCK}, got {self.decode_steps}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise EngineError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, or None, got {self.kv_dtype!r}")
        sizes = self.batch_sizes
        if sizes is not None and (not sizes or min(sizes) < 1 or max(sizes) < self.max_batch):
            raise EngineError(f"batch_sizes must reach max_batch ({self.max_batch}), got {sizes}")

    def fitted(self, model: Model) -> "EngineConfig":
        """These sizes, with pages that are large enough for the model and its device, and the number of snapshots."""
        dtype = self.cache_dtype(model)
        page_size = max(self.page_size, least_page_size(model.config, dtype, model.backend))
        snapshots = self.snapshots if model.config.delta_net else 0
        if snapshots is None:
            taken = (self.pages or 0) * device_page_bytes(model, page_size, dtype)
            snapshots = pool_snapshots(model, self.max_batch, taken, self.fits_pages(model))
        return replace(self, page_size=page_size, snapshots=snapshots)

    def sizes(self, model: Model) -> tuple[int, ...]:
        """Numbers of rows that the decode program is compiled for, smallest first."""
        if self.batch_sizes is not None:
            return tuple(sorted(self.batch_sizes))
        largest = _power_of_two(self.max_batch)
        smallest = model.backend.min_exact_batch
        if smallest is None:
            return (largest,)
        return tuple(1 << power for power in range(smallest.bit_length() - 1, largest.bit_length())) or (largest,)

    def chunk_pages(self, model: Model) -> int:
        """Number of pages of prompts that one program takes."""
        return chunk_pages(model.backend, model.config, self.page_size, self.chunk_tokens)

    def budget(self, model: Model) -> int:
        """Most prompt tokens that are computed in one step of the engine, before its decode."""
        return self.step_tokens or self.chunk_pages(model) * self.page_size

    def scheduler_limits(self, model: Model) -> dict[str, int]:
        """The arguments of a Scheduler, by their names."""
        budget = self.budget(model)
        # Where the pages of a prompt go one after another, a chunk has one of them: its other rows are for others.
        prompt_tokens = budget // self.chunk_pages(model) if model.config.delta_net else budget
        return {
            "max_sequences": self.max_batch,
            "step_tokens": budget,
            "decode_steps": self.decode_steps,
            "prompt_tokens": prompt_tokens,
        }

    def page_count(self, model: Model) -> int:
        """Number of pages of the cache for this model."""
        if self.pages is not None:
            return self.pages
        # More than `enough` pages would serve nobody but the prefix cache.
        enough = self.max_batch * -(-model.config.context_length // self.page_size)
        dtype, fitted = self.cache_dtype(model), self.fits_pages(model)
        return min(enough, pool_pages(model, self.page_size, dtype, self.state_copies, fitted))

    def state_snapshots(self, model: Model) -> StateSnapshots | None:
        """The snapshots of a prefix cache; None for a model without states."""
        return StateSnapshots(self.snapshots or 0) if model.config.delta_net else None

    @property
    def state_copies(self) -> int:
        """Number of sequences whose states there is room for, those in snapshots included."""
        return self.max_batch + (self.snapshots or 0)

    def warms_up(self, model: Model) -> bool:
        """Whether the programs are compiled, and the pool fitted to them, before the first request."""
        return model.mesh.devices.flat[0].platform != "cpu" if self.warm_up is None else self.warm_up

    def fits_pages(self, model: Model) -> bool:
        """Whether the programs are compiled by themselves, before there is a pool, for what they need of the memory.

        Not over several processes: XLA's compiler for GPUs shares its trials out over them, and waits for the others.
        """
        return self.warms_up(model) and jax.process_count() == 1

    def cache_dtype(self, model: Model) -> jnp.dtype:
        """Dtype of the cached keys and values."""
        activations = model.weights.dtype
        if activations == jnp.bfloat16 and _copies_bfloat16(model):
            activations = jnp.dtype(jnp.float32)
        return cache_dtype(activations, self.kv_dtype)


def _copies_bfloat16(model: Model) -> bool:
    """Whether every use of a pool in bfloat16 makes a copy of all of it in float32, as XLA's CPU compiler does."""
    on_cpu: bool = model.mesh.devices.flat[0].platform == "cpu"
    return on_cpu and model.backend.write_slots is None


def _power_of_two(count: int) -> int:
    """Smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
