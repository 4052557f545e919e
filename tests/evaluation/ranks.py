"""What has to come out of two processes (gloo, on the CPU) as it does of one."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from accelerate import PartialState

from unimm.evaluation.runs.store import processes

FORK = multiprocessing.get_context("fork")


def _rank(number: int, port: int, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"LOCAL_RANK": str(number), "RANK": str(number), "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    PartialState._reset_state()
    assert processes().num_processes == 2
    target(*arguments)
    processes().destroy_process_group()


def on_two_ranks(target: Callable[..., Any], *arguments: Any) -> None:
    """Call `target` in two processes that know of each other; what one of them raises fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [FORK.Process(target=_rank, args=(number, port, target, arguments)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    assert [child.exitcode for child in children] == [0, 0]
