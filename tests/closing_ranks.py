"""Two forked gloo ranks end through `run_main` in several ways; `python -m tests.closing_ranks FOLDER` prints how.

Run by test_closing.py as a program of its own, because only a program goes through the interpreter's shutdown.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unimm import launched
from unimm.errors import UserError, run_main

launched.CLOSING_SECONDS = 4
PATIENCE = 60  # seconds after which a rank has hung


def open_group() -> dict[str, Any]:
    """Open the group, and return a cycle that holds it, as a trainer's model in DDP does."""
    place = f"file://{os.environ['RENDEZVOUS']}"
    dist.init_process_group("gloo", init_method=place, rank=int(os.environ["RANK"]), world_size=2)
    cycle: dict[str, Any] = {"group": dist.group.WORLD}
    cycle["itself"] = cycle
    dist.all_gather_object([None, None], os.environ["RANK"])
    return cycle


def finish(rank: int) -> None:
    open_group()
    time.sleep(rank)  # one is done long before the other


def refuse(rank: int) -> None:
    open_group()
    raise UserError("wrong everywhere")


def refuse_on_one(rank: int) -> None:
    open_group()
    if rank == 1:
        raise UserError("wrong on one")
    dist.barrier()


def refuse_while_pending(rank: int) -> None:
    stop_while_pending(rank, UserError("wrong in the middle"))


def break_while_pending(rank: int) -> None:
    stop_while_pending(rank, ZeroDivisionError())


def stop_while_pending(rank: int, error: Exception) -> None:
    """Raise on one rank while a collective is pending in which the other, which never ends, does not take part."""
    held = open_group()
    if rank == 1:
        held["pending"] = dist.all_reduce(torch.ones(3), async_op=True)
        raise error
    time.sleep(2 * PATIENCE)


def threads() -> list[str]:
    """Return the names of gloo's threads in this process."""
    tasks = Path("/proc/self/task").iterdir()
    return sorted(name for task in tasks if "gloo" in (name := (task / "comm").read_text().strip()))


def rank_main(way: Callable[[int], None], rank: int, folder: Path) -> int:
    """Run one rank to its exit code, and write what is left of the group."""
    os.environ |= {"RANK": str(rank), "RENDEZVOUS": str(folder / "rendezvous")}
    code = run_main(lambda: way(rank), name="ranks")
    left = {"group": dist.is_initialized(), "threads": threads()}
    (folder / f"{rank}.json").write_text(json.dumps(left))
    return code


def end(way: Callable[[int], None], folder: Path) -> dict[str, Any]:
    """Fork the ranks, rank 1 first to be waited for, and return their exit codes and what was left."""
    children: list[int] = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            sys.exit(rank_main(way, rank, folder))
        children.append(child)
    last = os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1])
    if way in (refuse_while_pending, break_while_pending):
        os.kill(children[0], signal.SIGTERM)  # as a launcher does
    first = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    left = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {"codes": [first, last], "left": left}


def new_folder(name: str) -> Path:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    return folder


if __name__ == "__main__":
    ways = (finish, refuse, refuse_on_one, refuse_while_pending, break_while_pending)
    gc.freeze()  # ranks collect what is theirs
    ended = {way.__name__: end(way, new_folder(way.__name__)) for way in ways}
    dist.init_process_group("gloo", init_method=f"file://{new_folder('alone')}/rendezvous", rank=0, world_size=1)
    dist.barrier()  # its thread names itself once it runs, which is certain after a collective
    run_main(lambda: None)
    ended["opened_before"] = {"left": [{"group": dist.is_initialized(), "threads": threads()}]}
    dist.destroy_process_group()
    print(json.dumps(ended))
