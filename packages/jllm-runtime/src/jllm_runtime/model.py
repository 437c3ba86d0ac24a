"""Model: weights on their devices, with what it takes to run them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jllm_core.backends.base import Backend
from jllm_core.backends.select import select_backend
from jllm_core.config import ModelConfig
from jllm_core.model import Capture, Captured
from jllm_core.sharding import Placement, ShardingRules
from jllm_core.weights import Weights

from jllm_runtime.errors import RequestError

if TYPE_CHECKING:
    from jllm_runtime.chat_answer import ChatAnswer
    from jllm_runtime.sampling import SamplingParams
    from jllm_runtime.tokenizer import Tokenizer


Conversation = str | Sequence[Mapping[str, Any]]
"""Messages ``{"role": "user", "content": "..."}`` and so on; a text is one message of the user."""


@dataclass(frozen=True, repr=False)
class Model:
    """A model that is ready to run.

    Attributes:
        config: the architecture.
        weights: its arrays, laid out over the mesh.
        mesh: the devices it runs on.
        rules: how its arrays are laid out over them.
        tokenizer: None where the checkpoint has none; the model then takes token ids only.
        eos_ids: every id that ends a text, by the config, the generation config or the tokenizer.
        path: the checkpoint it was loaded from; None for weights made in memory.
        generation_config: the publisher's sampling settings, as ``generation_config.json`` has them;
            ``SamplingParams.of`` reads them.
    """

    config: ModelConfig
    weights: Weights
    mesh: Mesh
    rules: ShardingRules
    tokenizer: "Tokenizer | None" = None
    eos_ids: tuple[int, ...] = ()
    path: Path | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    def chat(self, messages: Conversation, params: "SamplingParams | None" = None, **variables: Any) -> "ChatAnswer":
        """The answer to a conversation, with its thinking apart.

        To get it piece by piece, or several side by side, give ``encode_chat`` to ``stream_generate`` or the Engine.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and so on; a text is one message of the user.
            params: of the answer; ``chat_params`` when None.
            variables: more variables of the chat template, such as ``enable_thinking=False`` and ``tools=[...]``; with
                ``continue_final_message=True`` the answer goes on from the last message, and is the rest of it.

        Raises:
            RequestError: as ``encode_chat`` and ``generate``.
            ModelError: what the publisher recommends is impossible.
        """
        # Here, for what generates is made of models.
        from jllm_runtime.chat_answer import answer_chat
        from jllm_runtime.generation import generate

        return answer_chat(self, messages, params, variables, lambda prompt, given: generate(self, prompt, given)[0])

    def chat_params(self, **variables: Any) -> "SamplingParams":
        """What the publisher recommends (``SamplingParams.of``), with a limit that is large enough for thinking.

        Args:
            variables: of the chat template; some turn thinking off.

        Raises:
            ModelError: what the publisher recommends is impossible.
        """
        from jllm_runtime.answer_length import default_max_tokens
        from jllm_runtime.sampling import SamplingParams

        thinks = self.tokenizer is not None and self.tokenizer.thinks(**variables)
        return SamplingParams.of(self, max_tokens=default_max_tokens(thinks))

    def encode_chat(self, messages: Conversation, **variables: Any) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; the arguments are those of ``chat``.

        Raises:
            RequestError: the model has no tokenizer or no chat template, or the template refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError(f"{self.path or 'the model'} has no tokenizer, so it takes token ids only: use generate")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.tokenizer.encode_chat(messages, **variables)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Save the model as a checkpoint, with its weights as they are now, its tokenizer and its settings.

        Weights that were trained or changed belong to a new model: ``dataclasses.replace(model, weights=trained)``.
        ``path`` holds the old checkpoint, the new one or none, whatever happens.

        Args:
            path: the folder to create.
            overwrite: replace a checkpoint that is there. Nothing but a checkpoint is ever replaced.

        Raises:
            CheckpointError: weights that do not fit the config or are spread over several processes, a destination that
                may not be replaced, or a full disk.
        """
        # Imported here: to run a model takes no code that saves one.
        from jllm_runtime.saving import save_model

        save_model(self, Path(path), overwrite)

    def logits(self, token_ids: Any) -> jax.Array:
        """The logits of the token after each given one, by the plain causal model without a cache.

        Args:
            token_ids: whole numbers, ``[B, T]``; texts of one length. To score shorter ones among them, fill up their
                ends with any valid id: no token sees what comes after it.

        Returns:
            float32 ``[B, T, V]``, whole on every device.

        Raises:
            RequestError: not ``[B, T]``, empty, longer than the context, or with ids outside the vocabulary.
        """
        from jllm_runtime.programs import scoring  # here, for who generates scores nothing

        tokens = _checked_tokens(token_ids, self.config)
        logits: jax.Array = scoring.all_logits(self.weights, tokens, self.config, self.placement)
        return logits

    def inspect(
        self,
        token_ids: Any,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        routing: bool = False,
    ) -> tuple[jax.Array, Captured]:
        """The logits, and what the model computes on the way to them, by the plain causal model without a cache.

        Layers count from 0.

        Args:
            token_ids: as ``logits`` takes them.
            hidden: the layers after which the residual stream is wanted.
            attention: the layers whose attention probabilities are wanted. They take ``4 * B * N * T * T`` bytes each.
            routing: whether the router choices of every mixture of experts are wanted.

        Returns:
            float32 ``[B, T, V]``; and by the numbers of the layers ``hidden [B, T, D]``, ``attention [B, N, T, T]`` in
            float32, and ``routing`` with ``probabilities [B*T, E]``, ``weights`` and ``experts [B*T, X]``. All whole on
            every device.

        Raises:
            RequestError: as ``logits``; or a layer that the model has not, or that has no attention.
        """
        from jllm_runtime.programs import scoring

        tokens = _checked_tokens(token_ids, self.config)
        for number in (*hidden, *attention):
            if not 0 <= number < self.config.num_layers:
                raise RequestError(
                    f"there is no layer {number} to inspect: the model's are 0 to {self.config.num_layers - 1}"
                )
        for number in attention:
            if self.config.mixer(number) != "attention":
                raise RequestError(
                    f"layer {number} is a delta net and has no attention to inspect; the layers that have are "
                    f"{', '.join(map(str, self.config.layers_with('attention'))) or 'none'}"
                )
        capture = Capture(tuple(hidden), tuple(attention), routing)
        found: tuple[jax.Array, Captured] = scoring.inspect(self.weights, tokens, capture, self.config, self.placement)
        return found

    def __repr__(self) -> str:
        from jllm_runtime.model_summary import summary

        return summary(self)

    @property
    def placement(self) -> Placement:
        """The mesh and the rules, as the compiled steps take them."""
        return Placement(self.mesh, self.rules)

    @cached_property
    def backend(self) -> Backend:
        """Where the model runs: the fastest backend that takes it on these devices, chosen when it is first used."""
        return select_backend(self.weights, self.config, self.placement)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that is whole on every device of the mesh."""
        return NamedSharding(self.mesh, PartitionSpec())


@dataclass(frozen=True, repr=False)
class ChatModel(Model):
    """A model for conversations: it has a tokenizer, with a chat template. ``load_chat_model`` makes one."""

    tokenizer: "Tokenizer"


def _checked_tokens(token_ids: Any, config: ModelConfig) -> np.ndarray:
    """Texts of one length as int32 ``[B, T]``, or a RequestError."""
    try:
        tokens = np.asarray(token_ids)
    except ValueError as error:
        raise RequestError(f"token_ids must be whole numbers [B, T], texts of one length: {error}") from error
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise RequestError(f"token_ids must be whole numbers [B, T], at least one, got {got}")
    if tokens.shape[1] > config.context_length:
        raise RequestError(f"{tokens.shape[1]} tokens are more than the context of {config.context_length}")
    check_token_ids(tokens.ravel(), config)
    return tokens.astype(np.int32)


def check_token_ids(token_ids: Any, config: ModelConfig) -> None:
    """Raise a RequestError for ids that are not in the vocabulary."""
    ids = np.asarray(token_ids)
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise RequestError(f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}")
