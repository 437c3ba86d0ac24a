"""What can be wrong with what a user asks of the runtime."""

from jllm_core.errors import JLLMError


class ModelError(JLLMError):
    """A model that cannot be found, resolved or loaded."""


class DistributedError(JLLMError):
    """Processes that cannot be named, found or joined."""


class MeshError(JLLMError):
    """A mesh that the devices at hand cannot make."""


class RequestError(JLLMError):
    """A prompt or a sampling parameter that cannot be honoured."""


class PlanError(JLLMError):
    """A plan that cannot be made: an unknown machine or model, or a compiler that is not there."""


class EngineError(JLLMError):
    """A request that the engine could not finish, or cannot take because it is closed."""


class QueueFullError(EngineError):
    """As many requests wait as the engine is told to keep; the request may come again later."""


class ServerError(JLLMError):
    """A server that cannot be started as asked, or that a client cannot talk with."""
