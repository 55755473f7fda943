"""Several processes of one distributed model."""

import os
from collections.abc import Callable

import torch

from tests.support.helpers import free_port


def run_ranks(function: Callable[..., None], *arguments) -> None:
    """Run `function(rank, *arguments)` in two processes that know each other, as `torchrun` tells them.

    They are forks of this one, which has imported all that they need. What a rank raises is raised here.
    """
    context = (os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},)
    torch.multiprocessing.start_processes(_be_a_rank, (function, *context, *arguments), nprocs=2, start_method="fork")


def _be_a_rank(rank: int, function: Callable[..., None], environment: dict[str, str], *arguments) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)  # a fork has no others
    function(rank, *arguments)
