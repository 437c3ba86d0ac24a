"""Order protocol of an engine over several processes: the leader sends each order, the followers compute along.

Every process has a Runner with its devices' part of the model and the pages. The first process schedules, and orders
each piece of work by its name and its arrays before it takes it up itself; the others do the same work in the same
order, since a program over several processes waits until all of them run it. An order goes two hops: from
``Leader.run`` to ``Follower.run``, which calls the Runner's method of that name.

    leader                       follower
    begin (sizes, traits)  --->
                           <---  ready (or the reason why not)
    an order               --->                                        no reply: the results are on every device
                           <---  failed (error)                        only where an order raised
    end                    --->
                           <---  ended
"""

import hashlib
import logging
from collections.abc import Mapping
from threading import Condition, Lock, Thread
from typing import Any

import jax

from jllm_runtime.__about__ import __version__
from jllm_runtime.distributed.messages import Message
from jllm_runtime.distributed.peers import FAREWELL, Peers
from jllm_runtime.distributed.rendezvous import connect
from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.runner import EMBED, RESET, Runner
from jllm_runtime.errors import DistributedError, EngineError
from jllm_runtime.model import Model

BEGIN, END = "begin", "end"
"""Messages of the leader, beside the orders: an engine begins, with these sizes; it has ended."""

READY, FAILED, ENDED = "ready", "failed", "ended"
"""Messages of a follower: it is ready, or why not; an order has failed; it has read the end."""

ALIKE_TIMEOUT_S = 20
"""Seconds within which an order that fails in one process must fail in all. If it does not, some of them wait inside a
program for one that will never come."""

logger = logging.getLogger(__name__)


class Leader:
    """The first process's side: sends each order to the followers, and has it done here.

    An order that fails everywhere (it needs more memory than there is) is an error like any other. One that fails in
    some processes only leaves the others inside a program for ever: that ends the run.

    Args:
        runner: does the orders in this process.
        peers: the followers, each of which is in ``follow`` or will be.
    """

    def __init__(self, runner: Runner, peers: Peers) -> None:
        self._runner = runner
        self._peers = peers
        # All processes must do all orders in one order. The engine's thread and callers of `embed` send them, so each
        # holds this lock until its order is sent and done.
        self._running = Lock()
        # Guards what follows, between the thread that runs an order and the one that reads the followers' messages.
        self._changed = Condition()
        self._refusals: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._has_failed = False
        self._ended: set[int] = set()
        self._is_ending = False
        self._reader = Thread(target=self._read, name="jllm-leader", daemon=True)
        self._reader.start()

    def begin(self, sizes: dict[str, Any], traits: dict[str, str]) -> None:
        """Wait until every follower is ready.

        Args:
            sizes: from ``runner_sizes``.
            traits: from ``model_traits``.

        Raises:
            DistributedError: one of them has another model or mesh.
        """
        self._peers.send(Message(BEGIN, {"sizes": sizes, "traits": traits}))
        with self._changed:
            self._changed.wait_for(lambda: self._refusals.keys() >= self._peers.indexes)
            refused = [f"process {index} has {why}" for index, why in sorted(self._refusals.items()) if why]
        if refused:
            # The followers wait for the end before they raise their own error, each with its part of the reason.
            self.end()
            raise DistributedError(f"{'; '.join(refused)}; all processes must load the same in the same way")

    def run(self, order: str, /, **values: Any) -> Any:
        """Have an order done in every process.

        Returns:
            The result in this one.

        Raises:
            EngineError: the engine has ended.
            Exception: what the order raised, here and in every other process.
        """
        with self._running:
            if self._is_ending:
                raise EngineError("the engine is closed")
            # Sent first, so that the followers begin while this process begins. They reply only where an order fails: a
            # reply to each would add a round trip to every step.
            self._peers.send(Message(order, values))
            try:
                return self._runner.run(order, **values)
            except Exception as error:
                self._wait_for_failures(error)
                raise

    def end(self) -> None:
        """Let the followers go, once they have done all orders."""
        with self._running:
            if self._is_ending:
                return
            self._is_ending = True
            self._peers.send(Message(END))
        # Whoever ends the process before the followers have read the end would be taken for lost.
        self._reader.join(ALIKE_TIMEOUT_S)

    def _wait_for_failures(self, error: Exception) -> None:
        """Wait until an order that has failed here has failed everywhere; else end the run."""
        with self._changed:
            self._has_failed = True
            self._changed.notify_all()
            alike = self._changed.wait_for(lambda: self._failures.keys() >= self._peers.indexes, ALIKE_TIMEOUT_S)
            self._has_failed = False
            self._failures.clear()
            self._changed.notify_all()
        if not alike:
            self._peers.abort(f"a step has failed in this process only: {type(error).__name__}: {error}")

    def _read(self) -> None:
        while not self._ended >= self._peers.indexes:
            index, message = self._peers.receive()
            if message.name == READY:
                with self._changed:
                    self._refusals[index] = str(message.values["refusal"])
                    self._changed.notify_all()
            elif message.name == FAILED:
                self._note_failure(index, str(message.values["error"]))
            elif message.name == ENDED:
                self._ended.add(index)
            elif message.name == FAREWELL:
                self._ended.add(index)
                # A follower that leaves in order, but too early, can do no further order.
                if not self._is_ending:
                    self._peers.abort(f"process {index} has ended")

    def _note_failure(self, index: int, error: str) -> None:
        """Note that an order has failed in a follower, and wait until it has failed here; else end the run."""
        with self._changed:
            self._failures[index] = error
            self._changed.notify_all()
            # Either the order fails here while we wait, or it has failed here before and the failures were cleared.
            alike = self._changed.wait_for(lambda: self._has_failed or not self._failures, ALIKE_TIMEOUT_S)
        if not alike:
            self._peers.abort(f"a step has failed in process {index} only: {error}")


class Follower:
    """Another process's side: does the leader's orders.

    Args:
        model: as ``follow`` has it.
        peers: the first process.
    """

    def __init__(self, model: Model, peers: Peers) -> None:
        self._model = model
        self._peers = peers
        self._runner: Runner | None = None
        self._is_broken = False

    def run(self) -> None:
        """Follow one engine to its end.

        Raises:
            DistributedError: as ``follow``.
        """
        refusal = ""
        while True:
            _, message = self._peers.receive()
            if message.name == BEGIN:
                # A reason to refuse is no reason to leave: the leader must hear it from all, and then says `end`.
                refusal = differences(model_traits(self._model), message.values["traits"])
                config = EngineConfig(**message.values["sizes"])
                self._runner = Runner(self._model, config, config.page_count(self._model))
                self._peers.send(Message(READY, {"refusal": refusal}))
            elif message.name == END:
                self._peers.send(Message(ENDED))
                break
            elif message.name == FAREWELL:
                raise DistributedError("the first process has ended, and has not closed its engine")
            else:
                self._do(message)
        if refusal:
            raise DistributedError(f"this process has {refusal}; all must load the same in the same way")

    def _do(self, order: Message) -> None:
        if self._runner is None:
            raise DistributedError(f"the first process has ordered {order.name!r:.40} before its engine has begun")
        # The pages are lost with the failed order, so further work on them means nothing. The leader will read of the
        # failure, and begin with empty pages or end the run.
        if self._is_broken and order.name != RESET:
            return
        try:
            self._runner.run(order.name, **order.values)
            self._is_broken = False
        except Exception as error:
            # `embed` leaves the pages alone.
            self._is_broken = order.name != EMBED
            reason = f"{type(error).__name__}: {error}"
            logger.warning("an order (%s) has failed: %s", order.name, reason)
            self._peers.send(Message(FAILED, {"error": reason}))


def follow(model: Model, companions: Peers | None = None) -> None:
    """Compute along with the ``Engine`` of the first process, until that one is closed.

    Of several processes (``jax.distributed``) the first makes an ``Engine`` and takes the requests; each of the others
    calls this, with the same model on the same mesh. Sizes are those of the first one's ``EngineConfig``.

    When the first process is lost, or another one, this ends the process with a message and exit code 1.

    Args:
        model: from ``load_model``, on a mesh over the devices of all processes.
        companions: the peers from ``distributed.processes.join``; connected here where there are none. The first
            process must do likewise.

    Raises:
        DistributedError: this is the first process, or the mesh is not over all processes; the first process has
            another model or mesh; or it has ended without closing its engine.
    """
    if jax.process_index() == 0:
        raise DistributedError("the first process takes the requests: make an Engine there, and follow in the others")
    if not _is_shared(model):
        raise DistributedError("the model's mesh has devices of this process alone, so there is nobody to follow")
    peers = companions if companions is not None and companions.indexes else connect()
    try:
        Follower(model, peers).run()
    finally:
        # Whoever made the connections takes leave on them.
        if peers is not companions:
            peers.farewell()


def connect_followers(model: Model) -> Peers | None:
    """Connect the other processes that a model lies on; None where there are none.

    Raises:
        DistributedError: this is not the first process, or the mesh is over some of the processes only.
    """
    if not _is_shared(model):
        return None
    if jax.process_index():
        raise DistributedError(
            f"process {jax.process_index()} of {jax.process_count()} takes no requests; make the Engine in process 0, "
            "and call follow(model) in the others"
        )
    return connect()


def _is_shared(model: Model) -> bool:
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


def runner_sizes(config: EngineConfig, pages: int) -> dict[str, Any]:
    """The fields of an EngineConfig that a Runner's arrays depend on."""
    return {
        "max_batch": config.max_batch,
        "page_size": config.page_size,
        "pages": pages,
        "snapshots": config.snapshots,
        "kv_dtype": config.kv_dtype,
    }


def model_traits(model: Model) -> dict[str, str]:
    """What must be the same in every process. Else they run different programs, and wait for each other for ever."""
    # Names, shapes and dtypes only. To compare the values would read all weights, and differing ones block nobody.
    leaves = jax.tree_util.tree_leaves_with_path(model.weights)
    weights = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
    axes = ",".join(f"{axis}={size}" for axis, size in model.mesh.shape.items())
    return {
        "version of jllm-runtime": __version__,
        "version of jax": jax.__version__,
        "model": _digest(model.config.to_json()),
        "type or quantization of the weights": _digest(*weights),
        "mesh": f"{axes} over devices {[device.id for device in model.mesh.devices.flat]}",
        "sharding": _digest(repr(model.rules)),
    }


def differences(own: Mapping[str, str], firsts: Mapping[str, str]) -> str:
    """Differences of a follower's traits from the first process's, in words; empty where there are none."""
    return ", ".join(
        f"another {name} ({value}, the first has {firsts.get(name)})"
        for name, value in own.items()
        if firsts.get(name) != value
    )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
