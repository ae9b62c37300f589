"""Show the race of PyTorch's gloo groups that dsv3/distributed/torch_private.py works around, or its absence.

Two ranks, sixteen functional gathers and a sum of a few numbers under way at a time, nothing of dsv3 but the
way around. Without it a rank dies or hangs once in some 100,000 collectives, sooner on a busy machine.

    python -m benchmarks.gloo_race --collectives 400000
    python -m benchmarks.gloo_race --collectives 400000 --around
"""

import argparse
import os
import socket
import time

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from dsv3.distributed.torch_private import shorten_gather_name

RANKS, GATHERS = 2, 16


def work(rank: int, collectives: int, around: bool, port: int) -> None:
    """One rank: collectives until there have been enough."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    if around:
        shorten_gather_name()
    dist.init_process_group("gloo")
    operators, group = torch.ops._c10d_functional, dist.group.WORLD
    assert group is not None
    x, name, started = torch.randn(4 * RANKS), group.group_name, time.monotonic()
    for done in range(0, collectives, GATHERS + 1):
        begun = [operators.all_gather_into_tensor(x, RANKS, name) for _ in range(GATHERS)]
        begun.append(operators.all_reduce(x, "sum", name))
        for result in begun:
            operators.wait_tensor(result)
        if rank == 0 and done % 17_000 == 0:
            print(f"{done:,} after {time.monotonic() - started:.0f} s", flush=True)
    if rank == 0:
        print(f"{collectives:,} collectives, no fault", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start both ranks; one that dies is reported with its signal, exit code 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--collectives", type=int, default=400_000)
    parser.add_argument("--around", action="store_true", help="with the way around it")
    chosen = parser.parse_args()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(work, (chosen.collectives, chosen.around, port), nprocs=RANKS)


if __name__ == "__main__":
    main()
