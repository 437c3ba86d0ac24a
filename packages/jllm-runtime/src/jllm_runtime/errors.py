"""Exceptions of the runtime."""

from jllm_core.errors import JLLMError


class ModelError(JLLMError):
    """Model that cannot be found, resolved or loaded."""


class DistributedError(JLLMError):
    """Processes that cannot be named, found or joined, or that do not run the same."""


class MeshError(JLLMError):
    """Device mesh that cannot be made of the devices at hand."""


class RequestError(JLLMError):
    """Prompt or parameter that cannot be honoured."""


class PlanError(JLLMError):
    """Plan that cannot be made: an unknown machine or model, or a compiler that is not there."""


class CacheError(JLLMError):
    """Cache folder that cannot be read, or a part of it that is not there or cannot be removed."""


class EngineError(JLLMError):
    """Request that the engine could not finish, or cannot take because it is closed."""


class QueueFullError(EngineError):
    """Full queue: ``max_queue`` answers wait already. The request may come again later."""


class ServerError(JLLMError):
    """Server that cannot be started as asked, or that a client cannot talk with."""
