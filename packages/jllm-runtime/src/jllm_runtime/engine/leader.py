"""The first process's side of an engine over several: every order goes to the others before it is done here."""

from threading import Condition, Lock, Thread
from typing import Any

from jllm_runtime.distributed.messages import Message
from jllm_runtime.distributed.peers import FAREWELL, Companions
from jllm_runtime.engine.protocol import BEGIN, END, ENDED, FAILED, READY
from jllm_runtime.engine.runner import Runner
from jllm_runtime.errors import DistributedError, EngineError

ALIKE_S = 20
"""Seconds within which an order that fails in one process must fail in all. If it does not, some wait in a step for one
that will never come."""


class Leader:
    """Has all processes do the same.

    An order that fails everywhere (the steps of all need more memory than there is) is an error like any other. One
    that fails in some processes only leaves the others inside a step for ever: it ends the run.

    Args:
        runner: does the orders in this process.
        companions: the lines to the others, each of which is in ``follow`` or will be.
    """

    def __init__(self, runner: Runner, companions: Companions) -> None:
        self._runner = runner
        self._companions = companions
        self._performing = Lock()
        self._changed = Condition()
        self._refusals: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._has_failed = False
        self._ended: set[int] = set()
        self._is_ending = False
        self._watcher = Thread(target=self._watch, name="jllm-leader", daemon=True)
        self._watcher.start()

    def begin(self, sizes: dict[str, Any], traits: dict[str, str]) -> None:
        """Wait until the others are ready, with these sizes.

        Raises:
            DistributedError: one of them has another model or mesh.
        """
        self._companions.tell(Message(BEGIN, {"sizes": sizes, "traits": traits}))
        with self._changed:
            self._changed.wait_for(lambda: self._refusals.keys() >= self._companions.indexes)
            refused = [f"process {index} has {why}" for index, why in sorted(self._refusals.items()) if why]
        if refused:
            self.end()
            raise DistributedError(f"{'; '.join(refused)}; all processes must load the same in the same way")

    def perform(self, name: str, /, **values: Any) -> Any:
        """Have an order done everywhere; gives what it gave here.

        Raises:
            EngineError: the engine has ended.
            Exception: what the order raised, here and in every other process.
        """
        with self._performing:
            if self._is_ending:
                raise EngineError("the engine is closed")
            self._companions.tell(Message(name, values))
            try:
                return self._runner.perform(name, **values)
            except Exception as error:
                self._wait_for_the_others(error)
                raise

    def end(self) -> None:
        """Let the others go, once they have done what they were told."""
        with self._performing:
            if self._is_ending:
                return
            self._is_ending = True
            self._companions.tell(Message(END))
        self._watcher.join(ALIKE_S)

    def _wait_for_the_others(self, error: Exception) -> None:
        """An order has failed here: go on when it has failed everywhere."""
        with self._changed:
            self._has_failed = True
            self._changed.notify_all()
            alike = self._changed.wait_for(lambda: self._failures.keys() >= self._companions.indexes, ALIKE_S)
            self._has_failed = False
            self._failures.clear()
            self._changed.notify_all()
        if not alike:
            self._companions.give_up(f"a step has failed in this process only: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        while not self._ended >= self._companions.indexes:
            index, message = self._companions.hear()
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
                if not self._is_ending:
                    self._companions.give_up(f"process {index} has ended")

    def _note_failure(self, index: int, error: str) -> None:
        """An order has failed in another process: it must fail here, too."""
        with self._changed:
            self._failures[index] = error
            self._changed.notify_all()
            alike = self._changed.wait_for(lambda: self._has_failed or not self._failures, ALIKE_S)
        if not alike:
            self._companions.give_up(f"a step has failed in process {index} only: {error}")
