"""Random numbers of data-loading workers that do not depend on what came before."""

import random
from typing import Optional

import numpy as np
import torch
from torch.utils.data import get_worker_info


class WorkerSeeder:
    """Seeds the data-loading workers before each batch that they load.

    A worker's random numbers become a function of (seed, rank, pass over the data,
    batch of that pass) and of nothing else: not of how many batches the same worker
    has loaded before, nor of the number of workers, nor of whether they persist. So
    a resumed run draws the augmentations that the uninterrupted one would have
    drawn, and no two epochs draw the same.

    It takes the place of a data loader's ``worker_init_fn`` (:meth:`init_worker`)
    and of its ``collate_fn`` (the object itself: a batch has been loaded when it is
    collated, so the next one can be seeded). What stood there before is still
    called. With ``num_workers=0`` it draws nothing and sets nothing.

    Args:
        collate_fn (callable): The data loader's own.
        init_fn (callable, optional): The data loader's own ``worker_init_fn``.
        seed (int): The seed of the run.
        rank (int): The rank of this process.
        batches_per_pass (int, optional): Batches of one pass over the data; None for
            a sampler without end.
    """

    def __init__(
        self,
        collate_fn,
        init_fn,
        seed: int,
        rank: int,
        batches_per_pass: Optional[int],
    ) -> None:
        self.collate_fn = collate_fn
        self.init_fn = init_fn
        self.seed = seed
        self.rank = rank
        self.batches_per_pass = batches_per_pass
        self.start()

    def start(self, first_pass: int = 0, first_batch: int = 0) -> None:
        """Say where the workers that are started next begin.

        Args:
            first_pass (int): The pass over the data. Defaults to 0.
            first_batch (int): The batch of a sampler without end. Defaults to 0.
        """
        self.first_pass = first_pass
        self.first_batch = first_batch
        self._loaded = 0

    def position(self, worker: int, num_workers: int) -> tuple:
        """(pass, batch) of the batch that a worker loads next."""
        if self.batches_per_pass is None:
            # Batches are dealt to the workers in turn.
            batch = self.first_batch + self._loaded * num_workers + worker
            return self.first_pass, batch
        # Every pass starts dealing at worker 0 again.
        share = max(1, -(-(self.batches_per_pass - worker) // num_workers))
        done, turn = divmod(self._loaded, share)
        return self.first_pass + done, turn * num_workers + worker

    def init_worker(self, worker_id: int) -> None:
        if self.init_fn is not None:
            self.init_fn(worker_id)
        self._seed_next()

    def __call__(self, samples):
        batch = self.collate_fn(samples)
        if get_worker_info() is not None:
            self._loaded += 1
            self._seed_next()
        return batch

    def _seed_next(self) -> None:
        info = get_worker_info()
        position = self.position(info.id, info.num_workers)
        mixed = np.random.SeedSequence((self.seed, self.rank, *position))
        words = mixed.generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        # Not torch.manual_seed, which queues work for CUDA at every call.
        torch.default_generator.manual_seed(int(words[2]))
