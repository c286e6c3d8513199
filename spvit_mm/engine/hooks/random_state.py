import random
from collections.abc import Iterator
from itertools import count, islice, repeat
from typing import Any, Optional

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop
from mmpretrain.registry import HOOKS

from .worker_seeder import WorkerSeeder

KEY = 'random_state'
VERSION = 2


def get_random_state() -> dict[str, Any]:
    """Read the state of every random generator that training draws from.

    Returns:
        dict: ``python``, ``numpy`` and ``torch`` (CPU) and, where CUDA is in use,
        ``cuda`` (the current device), in types that
        ``torch.load(..., weights_only=True)`` reads.
    """
    name, keys, *rest = np.random.get_state()
    state = {
        'python': random.getstate(),
        'numpy': (str(name), keys.tolist(), *rest),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set what :func:`get_random_state` has read.

    Args:
        state (dict): A state; its tensors may lie on any device. A ``cuda`` entry is
            left out where there is no CUDA.
    """
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def _seeded_sampler(dataloader) -> Optional[Any]:
    """The sampler of a data loader that orders the data by a seed of its own."""
    inner = getattr(dataloader.batch_sampler, 'sampler', None)
    for sampler in (dataloader.sampler, inner):
        if isinstance(getattr(sampler, 'seed', None), int):
            return sampler
    return None


class _Batches:
    """Takes the place of an iteration loop's own endless iterator.

    That one starts its workers before any hook can seed them (mmengine) or after the
    random state has been restored (its fork), and mmengine's loads every batch that
    it skips.

    Args:
        batches (Iterator): The batches, from the one on that the loop is to use next.
    """

    def __init__(self, batches: Iterator) -> None:
        self._batches = batches

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Nothing to do: these batches begin behind the skipped ones."""


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Let a resumed run end with the weights of the uninterrupted one.

    The state of Python's, numpy's, torch's and CUDA's random generators of every
    rank goes into each checkpoint, with the seed of the sampler that orders the
    data, and comes back when training resumes: at the beginning of an epoch in epoch
    loops, at any saved iteration in iteration loops.

    What makes it exact:

    - Training continues, resumed or not, from the state that was read. What
      validation draws in between (and the start of its workers) therefore changes
      nothing.
    - Workers are seeded before each batch (:class:`WorkerSeeder`), so any
      ``num_workers`` and ``persistent_workers`` resume exactly. mmengine's default
      gives a worker the same numbers in every epoch; this does not.
    - The sampler's seed is kept too, so ``randomness.seed=None`` resumes exactly.

    What it cannot make exact: a checkpoint saved in the middle of an epoch of an
    epoch loop (mmengine starts that epoch again); a resumed run with another number
    of processes; transforms and samplers that hold generators of their own; kernels
    that are not deterministic (``randomness=dict(deterministic=True)`` helps);
    checkpoints without the optimizer, such as ``best_*.pth``.

    A checkpoint without random state is resumed as mmengine does, with a warning.

    Args:
        seed_workers (bool): Whether the data-loading workers are seeded before each
            batch. False leaves a data loader's ``worker_init_fn`` and ``collate_fn``
            alone; resuming is then exact for ``num_workers=0`` only.
            Defaults to True.

    Examples:
        >>> default_hooks = dict(
        ...     checkpoint=dict(type='AtomicCheckpointHook', interval=1),
        ...     random_state=dict(type='RandomStateHook'))
    """

    # Before CheckpointHook (VERY_LOW), which saves what is read here, and after
    # all others.
    priority = 85

    def __init__(self, seed_workers: bool = True) -> None:
        self.seed_workers = seed_workers
        self._training = False
        self._loaded: Optional[dict] = None
        self._all_ranks: Optional[dict] = None
        self._resume_from: Optional[dict] = None
        self._seeder: Optional[WorkerSeeder] = None

    # Reading and saving

    def _read(self, runner, iteration: int) -> None:
        """Read every rank's state, to be called on all ranks.

        Args:
            runner (Runner): The runner.
            iteration (int): Iterations done.
        """
        if self._all_ranks is not None and self._all_ranks['iter'] == iteration:
            return
        self._resume_from = get_random_state()
        sampler = _seeded_sampler(runner.train_dataloader)
        sampler_seed = None if sampler is None else sampler.seed
        mine = {**self._resume_from, 'sampler_seed': sampler_seed}
        ranks = all_gather_object(mine)
        self._all_ranks = {'version': VERSION, 'iter': iteration, 'ranks': ranks}

    def after_train_epoch(self, runner) -> None:
        if not self._iteration_loop:
            self._read(runner, runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self._iteration_loop and self._checkpoint_is_due(runner):
            self._read(runner, runner.iter + 1)

    def before_val_epoch(self, runner) -> None:
        if self._training:
            self._read(runner, runner.iter)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        # Called on one rank alone, which is why the states were gathered before.
        state = self._all_ranks
        if state is not None and state['iter'] == checkpoint['meta']['iter']:
            checkpoint[KEY] = state

    def _checkpoint_is_due(self, runner) -> bool:
        return any(
            not hook.by_epoch
            and (
                hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                or (hook.save_last and hook.is_last_train_iter(runner))
            )
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook)
        )

    # Restoring

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        # Whether it is resumed or only its weights are loaded shows in before_train.
        self._loaded = checkpoint.get(KEY)

    def before_train(self, runner) -> None:
        self._training = True
        self._iteration_loop = isinstance(runner.train_loop, IterBasedTrainLoop)
        self._all_ranks = self._resume_from = None
        if runner.iter > 0:
            self._take(runner, self._loaded)
        self._loaded = None

        dataloader = runner.train_dataloader
        if self.seed_workers and dataloader.num_workers > 0:
            endless = isinstance(_seeded_sampler(dataloader), InfiniteSampler)
            self._seeder = WorkerSeeder(
                dataloader.collate_fn,
                dataloader.worker_init_fn,
                runner.seed,  # mmengine has resumed it
                get_rank(),
                None if endless else len(dataloader),
            )
            dataloader.collate_fn = self._seeder
            dataloader.worker_init_fn = self._seeder.init_worker

    def _take(self, runner, state: Optional[dict]) -> None:
        """Take over the state of the checkpoint that is resumed."""
        problem, world_size = None, get_world_size()
        if state is None or state['version'] != VERSION:
            problem = f'it holds none of version {VERSION}'
        elif len(state['ranks']) != world_size:
            saved = len(state['ranks'])
            problem = f'{saved} process(es) saved it and {world_size} resume it'
        if problem is not None:
            runner.logger.warning(
                'The random state of the checkpoint is not restored, since '
                f'{problem}: training resumes, but will not end with exactly the '
                'weights of an uninterrupted run.'
            )
            return
        self._resume_from = state['ranks'][get_rank()]
        sampler_seed = self._resume_from['sampler_seed']
        sampler = _seeded_sampler(runner.train_dataloader)
        if sampler is not None and sampler_seed is not None:
            sampler.seed = sampler_seed

    def before_train_epoch(self, runner) -> None:
        loop = runner.train_loop
        if not self._iteration_loop:
            if self._seeder is not None:
                self._seeder.start(first_pass=runner.epoch)
            self._restore()
            return
        skips = not getattr(loop, 'fast_forward_on_resume', False)
        skips_by_next = not hasattr(loop.dataloader_iterator, 'skip_iter')
        # Workers that persist and were started unseeded would be used again.
        loop.dataloader_iterator = loop.dataloader._iterator = None
        batches = self._batches(
            loop.dataloader, runner.iter if skips else 0, skips_by_next
        )
        loop.dataloader_iterator = _Batches(batches)

    def _batches(self, dataloader, first: int, skips_by_next: bool) -> Iterator:
        """The batches of an iteration loop, pass after pass.

        Args:
            dataloader (DataLoader): The data loader of the loop.
            first (int): Batches that the checkpoint's run has used already.
            skips_by_next (bool): Whether the loop skips them by ``first`` calls of
                ``next`` (mmengine) rather than by ``skip_iter`` (its fork).
        """
        yield from repeat(None, first if skips_by_next else 0)
        sampler, to_drop, first_batch = _seeded_sampler(dataloader), first, 0
        if isinstance(sampler, InfiniteSampler) and dataloader.batch_size is not None:
            # The stream of indices is made anew: an iterator that mmengine's loop
            # had opened has taken some of it, in the order of another seed perhaps.
            skipped = first * dataloader.batch_size
            sampler.indices = islice(sampler._indices_of_rank(), skipped, None)
            to_drop, first_batch = 0, first
        passes = self._passes(dataloader, sampler, first_batch)
        for _ in range(1 + to_drop):
            next(passes)
        while True:
            # After the iterator is there: making one draws from the global generator.
            self._restore()
            yield next(passes)

    def _passes(self, dataloader, sampler, first_batch: int) -> Iterator:
        """None once an iterator is there, then the batches of pass after pass."""
        for number in count():
            if number and hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(number)
            if self._seeder is not None:
                self._seeder.start(number, first_batch)
            batches = iter(dataloader)
            if number == 0:
                yield None
            yield next(batches)  # raises where a pass has none, and all would
            yield from batches

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # Starting workers draws from the global generator, and workers that persist
        # are not started again: continue from the state behind that.
        workers = runner.train_dataloader.num_workers > 0
        if not self._iteration_loop and batch_idx == 0 and workers:
            self._restore()
        self._resume_from = None

    def _restore(self) -> None:
        if self._resume_from is not None:
            set_random_state(self._resume_from)

    def after_train(self, runner) -> None:
        self._training = False
        if self._seeder is not None:
            runner.train_dataloader.collate_fn = self._seeder.collate_fn
            runner.train_dataloader.worker_init_fn = self._seeder.init_fn
            self._seeder = None
