"""Several processes: how they are named and find each other. Running a model together is in tests/e2e."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jllm_core.sharding import PRESETS
from jllm_runtime.cli_options import SHARDINGS
from jllm_runtime.distributed import peers as peers_module
from jllm_runtime.distributed import processes
from jllm_runtime.distributed.peers import Peers
from jllm_runtime.distributed.processes import Processes, is_cluster, join
from jllm_runtime.distributed.rendezvous import meet
from jllm_runtime.errors import DistributedError
from jllm_runtime.sampling import draw_seed


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here", 2, 0), "the coordinator is HOST:PORT, such as .*, got 'here'"),
        (("host:port", 2, 0), "the coordinator is HOST:PORT"),
        (("host:70000", 2, 0), "the coordinator is HOST:PORT"),
        (("host:1", 0, 0), "the number of processes must be at least 1, got 0"),
        (("host:1", 2, 2), "the process id must be from 0 to 1 for 2 processes, got 2"),
        (("host:1", 2, -1), "the process id must be from 0 to 1"),
    ],
)
def test_processes_that_cannot_be(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(DistributedError, match=message):
        Processes(*arguments)


@pytest.mark.parametrize("index", [0, 1])
def test_who_is_missing_is_said_in_time(monkeypatch: pytest.MonkeyPatch, address: str, index: int) -> None:
    monkeypatch.setattr(processes, "JOIN_TIMEOUT_S", 0.5)
    start = time.monotonic()
    expected = r"process 1 of 3 has not come .* \(missing: \[1, 2\]\)" if index == 0 else "found no coordinator at"
    with pytest.raises(DistributedError, match=expected):
        join(Processes(address, 3, index))
    assert time.monotonic() - start < 10


def test_all_go_on_once_all_are_there(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    lost: list[str] = []
    monkeypatch.setattr(peers_module, "exit_now", lost.append)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(meet, address, count=3, index=index, timeout_s=20) for index in (2, 1)]
        time.sleep(0.3)
        assert not any(other.done() for other in others)
        first = meet(address, count=3, index=0, timeout_s=20)
        second, third = (other.result(timeout=10) for other in reversed(others))
    # One ends well, the other is gone.
    second.farewell()
    time.sleep(0.3)
    assert lost == []
    hang_up(third)
    deadline = time.monotonic() + 10
    while len(lost) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "process 0 of 3 cannot go on, process 2 was lost or failed" in lost
    # None of them may listen on: what they hear when the test is over would end it for real.
    for peers in (first, second):
        hang_up(peers)
    for peers in (first, second, third):
        for reader in peers._readers:
            reader.join(timeout=10)
            assert not reader.is_alive()


def hang_up(peers: Peers) -> None:
    for connection in peers._connections.values():
        with contextlib.suppress(OSError):  # it has ended already
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def test_two_processes_of_one_id_are_refused(address: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(meet, address, count=3, index=1, timeout_s=5) for _ in range(2)]
        with pytest.raises(DistributedError, match="two processes have the id 1"):
            meet(address, count=3, index=0, timeout_s=5)
        assert all(isinstance(other.exception(timeout=20), DistributedError) for other in others)


def test_a_port_that_is_taken_is_an_error(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with socket.create_server(("", port)), pytest.raises(DistributedError, match=f"on port {port}: .*in use"):
        join(Processes(address, 2, 0))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
    ],
)
def test_a_cluster_is_known_by_its_environment(environ: dict[str, str], expected: bool) -> None:
    assert is_cluster(environ) is expected


SLURM = {
    **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"},
    **{"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
}


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"]
)
@pytest.mark.parametrize("value", [None, ""])
def test_a_slurm_step_of_which_a_part_is_missing_is_refused(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, whole in {**SLURM, name: value}.items():
        if whole is None:
            monkeypatch.delenv(other, raising=False)
        else:
            monkeypatch.setenv(other, whole)
    got = "not set" if value is None else repr(value)
    with pytest.raises(DistributedError, match=f"Slurm step of 2 tasks: {name} is {got}; start the command with srun"):
        join(None)


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
            [],
            "in part that of a Slurm step of 2 tasks: SLURM_NTASKS",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, [], "the environment names none; name them with --coordinator"),
        ({"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://127.0.0.1:1"}, ["--distributed"], "OMPI_COMM_WORLD_SIZE is not"),
    ],
    ids=["slurm", "tpu", "open mpi"],
)
def test_a_cluster_that_is_named_in_part_is_one_sentence(
    environment: dict[str, str], options: list[str], message: str, friendly_checkpoint: Path
) -> None:
    command = [sys.executable, "-m", "jllm_runtime", "generate", str(friendly_checkpoint), "--prompt", "hi", *options]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_seeds_are_drawn_anew() -> None:
    assert len({draw_seed() for _ in range(8)}) == 8


def test_the_command_offers_every_preset() -> None:
    assert tuple(PRESETS) == SHARDINGS
