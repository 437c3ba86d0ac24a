"""The other processes' side of an engine over several: they do what the first one says, until it is done."""

import logging

import jax

from jllm_runtime.distributed.messages import Message
from jllm_runtime.distributed.peers import FAREWELL, Companions
from jllm_runtime.distributed.rendezvous import connect
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.protocol import BEGIN, END, ENDED, FAILED, READY, RESET, differences, traits
from jllm_runtime.engine.runner import Runner
from jllm_runtime.errors import DistributedError
from jllm_runtime.loading import Model

logger = logging.getLogger(__name__)


def follow(model: Model, companions: Companions | None = None) -> None:
    """Compute along with the ``Engine`` of the first process, until that one is closed.

    Of several processes (``jax.distributed``) the first makes an ``Engine`` and takes the requests; each of the others
    calls this, with the same model on the same mesh. Sizes are those of the first one's ``EngineConfig``.

    When the first process is lost, or another one, this ends the process with a message and exit code 1.

    Args:
        model: from ``load_model``, on a mesh over the devices of all processes.
        companions: the lines between the processes, where ``distributed.join`` has made some; made when None. The
            first process must do likewise.

    Raises:
        DistributedError: this is the first process, or the mesh is not over all processes; the first process has
            another model or mesh; or it has ended without closing its engine.
    """
    if jax.process_index() == 0:
        raise DistributedError("the first process takes the requests: make an Engine there, and follow in the others")
    if not is_shared(model):
        raise DistributedError("the model's mesh has devices of this process alone, so there is nobody to follow")
    made = companions if companions is not None and companions.indexes else connect()
    try:
        Follower(model, made).run()
    finally:
        if made is not companions:
            made.farewell()


def is_shared(model: Model) -> bool:
    """Whether the model lies on devices of several processes.

    Raises:
        DistributedError: of some, but not of all.
    """
    found = {device.process_index for device in model.mesh.devices.flat}
    if found == {jax.process_index()}:
        return False
    if len(found) != jax.process_count():
        raise DistributedError(
            f"the mesh has devices of the processes {sorted(found)}, of {jax.process_count()}; an engine takes a mesh "
            "over the devices of all processes, or of its own alone"
        )
    return True


class Follower:
    """Receives orders and does them.

    Args:
        model: as ``follow`` has it.
        companions: the line to the first process.
    """

    def __init__(self, model: Model, companions: Companions) -> None:
        self._model = model
        self._companions = companions
        self._runner: Runner | None = None
        self._is_broken = False

    def run(self) -> None:
        """Follow one engine to its end.

        Raises:
            DistributedError: as ``follow``.
        """
        refusal = ""
        while True:
            _, message = self._companions.hear()
            if message.name == BEGIN:
                refusal = differences(traits(self._model), message.values["traits"])
                config = EngineConfig(**message.values["sizes"])
                self._runner = Runner(self._model, config, config.page_count(self._model))
                self._companions.tell(Message(READY, {"refusal": refusal}))
            elif message.name == END:
                self._companions.tell(Message(ENDED))
                break
            elif message.name == FAREWELL:
                raise DistributedError("the first process has ended, and has not closed its engine")
            else:
                self._perform(message)
        if refusal:
            raise DistributedError(f"this process has {refusal}; all must load the same in the same way")

    def _perform(self, message: Message) -> None:
        if self._runner is None:
            raise DistributedError(f"the first process has ordered {message.name!r:.40} before its engine has begun")
        if self._is_broken and message.name != RESET:
            return  # what it would work on is lost; the first process will hear of it, and begin anew or give up
        try:
            self._runner.perform(message.name, **message.values)
            self._is_broken = False
        except Exception as error:
            # To embed leaves the pages alone.
            self._is_broken = message.name != Runner.embed.__name__
            told = f"{type(error).__name__}: {error}"
            logger.warning("an order (%s) has failed: %s", message.name, told)
            self._companions.tell(Message(FAILED, {"error": told}))
