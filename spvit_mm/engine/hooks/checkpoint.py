import hashlib
import os
import os.path as osp
import shutil
from contextlib import contextmanager
from glob import escape, glob

import torch
from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader, Runner
from mmpretrain.registry import HOOKS

# Hidden, and with no suffix that a checkpoint has.
PARTIAL = '.{}.partial'


def _put_in_place(partial: str, final: str) -> None:
    """Give a completely written file its name: there at once, or not at all."""
    with open(partial, 'rb+') as file:
        os.fsync(file.fileno())
    os.replace(partial, final)


class _DelayedRemoval:
    """A file backend that removes nothing until it is told to."""

    def __init__(self, backend) -> None:
        self._backend = backend
        self.removals = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def remove(self, path) -> None:
        self.removals.append((self._backend.remove, str(path)))

    def rmtree(self, path) -> None:
        self.removals.append((self._backend.rmtree, str(path)))


class _AtomicRunner:
    """A runner that writes a checkpoint beside its place and then renames it.

    Args:
        runner (Runner): The runner that does all else.
        work_dir (str): Where mmengine's hook writes its ``last_checkpoint``.
    """

    def __init__(self, runner, work_dir: str) -> None:
        self._runner = runner
        self.work_dir = work_dir
        self.saved = set()

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir, filename, *args, **kwargs) -> None:
        final = osp.join(out_dir, filename)
        partial = osp.join(out_dir, PARTIAL.format(filename))
        self.saved.add(final)
        try:
            # Runner.save_checkpoint saves on the main process alone.
            self._runner.save_checkpoint(
                out_dir, osp.basename(partial), *args, **kwargs
            )
            if is_main_process():
                _put_in_place(partial, final)
        finally:
            if is_main_process() and osp.isfile(partial):
                os.remove(partial)  # the disk is full, or the like


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, without moments at which a kill loses something.

    - A checkpoint (step, best, published) is written to ``.<name>.partial`` in the
      same folder, flushed to the disk and renamed: a file that has a checkpoint's
      name is whole. Partial files of a killed run are removed at the next start.
    - ``last_checkpoint`` is renamed into place as well, after the file that it names.
    - With ``max_keep_ckpts``, and for the best checkpoint, the old file is removed
      after the new one is there.
    - A published file carries the first 8 digits of its own SHA-256, the form that
      ``torch.hub`` checks.

    On storage other than the local file system (``s3://`` and the like, where a file
    appears when it is complete) and with runners of other kinds (DeepSpeed's folders),
    checkpoints are written as CheckpointHook writes them.

    Args:
        *args, **kwargs: All arguments of :class:`mmengine.hooks.CheckpointHook`.
    """

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if self._is_local(runner) and is_main_process():
            for folder in {str(self.out_dir), runner.work_dir}:
                self._remove_partial_files(runner, folder)

    def _is_local(self, runner) -> bool:
        return isinstance(self.file_backend, LocalBackend) and isinstance(
            runner, Runner
        )

    def _remove_partial_files(self, runner, folder: str) -> None:
        for path in glob(osp.join(escape(folder), PARTIAL.format('*'))):
            shutil.rmtree(path) if osp.isdir(path) else os.remove(path)
            runner.logger.info(f'Removed {path}, left by a run that was killed.')

    @contextmanager
    def _atomic(self, runner):
        """A runner for mmengine's saving methods that leaves nothing half done."""
        if not self._is_local(runner):
            yield runner
            return
        scratch = osp.join(runner.work_dir, PARTIAL.format('last_checkpoint'))
        backend = self.file_backend
        delayed = self.file_backend = _DelayedRemoval(backend)
        atomic = _AtomicRunner(runner, scratch)
        try:
            if is_main_process():
                os.makedirs(scratch, exist_ok=True)
            yield atomic
        finally:
            self.file_backend = backend
        if not is_main_process():
            return
        pointer = osp.join(scratch, 'last_checkpoint')
        if osp.isfile(pointer):
            _put_in_place(pointer, osp.join(runner.work_dir, 'last_checkpoint'))
        os.rmdir(scratch)
        for remove, path in delayed.removals:
            # A best checkpoint of a folder that was copied is not ours to remove.
            if path not in atomic.saved and osp.dirname(path) == str(self.out_dir):
                remove(path)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        if isinstance(runner, _AtomicRunner):  # called by _save_best_checkpoint
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        with self._atomic(runner) as runner:
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        if not self.save_best:
            return
        with self._atomic(runner) as runner:
            super()._save_best_checkpoint(runner, metrics)

    @master_only
    def _publish_model(self, runner, ckpt_path: str) -> None:
        if not self._is_local(runner):
            super()._publish_model(runner, ckpt_path)
            return
        checkpoint = CheckpointLoader.load_checkpoint(ckpt_path, map_location='cpu')
        kept = {k: v for k, v in checkpoint.items() if k in self.published_keys}
        folder, name = osp.split(ckpt_path)
        partial = osp.join(folder, PARTIAL.format(name))
        torch.save(kept, partial)
        digest = hashlib.sha256()
        with open(partial, 'rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        final = f'{osp.splitext(ckpt_path)[0]}-{digest.hexdigest()[:8]}.pth'
        _put_in_place(partial, final)
        runner.logger.info(
            f'{ckpt_path} is published as {final} with {sorted(kept)} (left out: '
            f'{sorted(set(checkpoint) - set(kept))}).'
        )
