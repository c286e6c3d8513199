from collections.abc import Callable
from itertools import islice
from typing import Any, Optional

from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop
from mmpretrain.registry import HOOKS

from ..random_state import WorkerSeeder, get_random_state, set_random_state

KEY = 'random_state'


def _seeded_sampler(dataloader) -> Optional[Any]:
    """The sampler of a data loader that orders the data by a seed of its own."""
    for sampler in (
        dataloader.sampler,
        getattr(dataloader.batch_sampler, 'sampler', None),
    ):
        if isinstance(getattr(sampler, 'seed', None), int):
            return sampler
    return None


def _batches_per_pass(dataloader) -> Optional[int]:
    """Batches of one pass over the data, None for a sampler without end."""
    if isinstance(_seeded_sampler(dataloader), InfiniteSampler):
        return None
    try:
        return len(dataloader)
    except TypeError:  # an iterable dataset need not know its length
        return None


class _Batches:
    """The batches of an iteration loop from a given iteration on.

    Takes the place of the loop's own endless iterator. That one starts its workers
    before any hook can seed them (mmengine) or after the random state has been
    restored (its fork), and mmengine's loads every batch that it skips.

    Args:
        dataloader (DataLoader): The data loader of the loop.
        first (int): Batches that the checkpoint's run has used already.
        skips_by_next (bool): Whether the loop skips them by ``first`` calls of
            ``next`` (mmengine) rather than by :meth:`skip_iter` (its fork).
        seeder (WorkerSeeder, optional): Seeds the workers.
        before_batch (callable): Called before a batch is drawn.
    """

    def __init__(
        self,
        dataloader,
        first: int,
        skips_by_next: bool,
        seeder: Optional[WorkerSeeder],
        before_batch: Callable[[], None],
    ) -> None:
        self.dataloader = dataloader
        self.first = first
        self.seeder = seeder
        self.before_batch = before_batch
        self._calls_to_ignore = first if skips_by_next else 0
        self._pass = 0
        self._iterator = None

    def __iter__(self):
        return self

    def skip_iter(self, num_iters: int) -> None:
        """Nothing to do: these batches begin behind the skipped ones."""

    def __next__(self):
        if self._calls_to_ignore:
            self._calls_to_ignore -= 1
            return None
        if self._iterator is None:
            self._open()
        # After the iterator is there: making one draws from the global generator.
        self.before_batch()
        return self._draw()

    def _open(self) -> None:
        sampler = _seeded_sampler(self.dataloader)
        batch_size = self.dataloader.batch_size
        if isinstance(sampler, InfiniteSampler) and batch_size is not None:
            # The stream of indices is made anew: an iterator that mmengine's loop
            # had opened has taken some of it, in the order of another seed perhaps.
            skipped = self.first * batch_size
            sampler.indices = islice(sampler._indices_of_rank(), skipped, None)
            self._begin_pass(first_batch=self.first)
            return
        self._begin_pass()
        for _ in range(self.first):
            self._draw()

    def _begin_pass(self, first_batch: int = 0) -> None:
        for sampler in (
            self.dataloader.sampler,
            getattr(self.dataloader.batch_sampler, 'sampler', None),
        ):
            if self._pass and hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(self._pass)
                break
        if self.seeder is not None:
            self.seeder.start(self._pass, first_batch)
        self._iterator = iter(self.dataloader)

    def _draw(self):
        try:
            return next(self._iterator)
        except StopIteration:
            self._pass += 1
            self._begin_pass()
            return next(self._iterator)


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
        self._from_checkpoint: Optional[dict] = None
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
        mine = {
            **self._resume_from,
            'sampler_seed': None if sampler is None else sampler.seed,
            'worker_seed': self._worker_seed,
        }
        self._all_ranks = {
            'version': 1,
            'iter': iteration,
            'ranks': all_gather_object(mine),
        }

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
        self._from_checkpoint = {
            'meta_iter': checkpoint.get('meta', {}).get('iter'),
            'state': checkpoint.get(KEY),
        }

    def before_train(self, runner) -> None:
        self._training = True
        self._iteration_loop = isinstance(runner.train_loop, IterBasedTrainLoop)
        self._worker_seed = runner.seed
        self._all_ranks = self._resume_from = None
        if runner.iter > 0 and self._from_checkpoint is not None:
            self._take(runner, self._from_checkpoint)
        self._from_checkpoint = None

        dataloader = runner.train_dataloader
        if self.seed_workers and dataloader.num_workers > 0:
            self._seeder = WorkerSeeder(
                dataloader.collate_fn,
                dataloader.worker_init_fn,
                self._worker_seed,
                get_rank(),
                _batches_per_pass(dataloader),
            )
            dataloader.collate_fn = self._seeder
            dataloader.worker_init_fn = self._seeder.init_worker

    def _take(self, runner, loaded: dict) -> None:
        """Take over the state of the checkpoint that is resumed."""
        state = loaded['state']
        world_size = get_world_size()
        problem = None
        if state is None:
            problem = 'it holds none'
        elif loaded['meta_iter'] != runner.iter:
            problem = f'it belongs to another iteration ({loaded["meta_iter"]})'
        elif len(state['ranks']) != world_size:
            problem = (
                f'{len(state["ranks"])} process(es) saved it and {world_size} resume it'
            )
        if problem is not None:
            runner.logger.warning(
                'The random state of the checkpoint is not restored, since '
                f'{problem}: training resumes, but will not end with exactly the '
                'weights of an uninterrupted run.'
            )
            return
        mine = state['ranks'][get_rank()]
        self._resume_from = mine
        self._worker_seed = mine['worker_seed']
        sampler = _seeded_sampler(runner.train_dataloader)
        if sampler is not None and mine['sampler_seed'] is not None:
            sampler.seed = mine['sampler_seed']

    def before_train_epoch(self, runner) -> None:
        loop = runner.train_loop
        if not self._iteration_loop:
            if self._seeder is not None:
                self._seeder.start(first_pass=runner.epoch)
            self._restore()
            return
        skips = not getattr(loop, 'fast_forward_on_resume', False)
        first = runner.iter if skips else 0
        skips_by_next = not hasattr(loop.dataloader_iterator, 'skip_iter')
        # Workers that persist and were started unseeded would be used again.
        loop.dataloader_iterator = loop.dataloader._iterator = None
        loop.dataloader_iterator = _Batches(
            loop.dataloader, first, skips_by_next, self._seeder, self._restore
        )

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
