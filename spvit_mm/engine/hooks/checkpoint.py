import hashlib
import io
import os
import os.path as osp
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, Runner
from mmpretrain.registry import HOOKS

from ...utils import whole_file

# How whole_file names what it writes.
PARTIAL = '.[0-9]*.partial.*'


def _plain(value):
    """Tensors and plain containers in the place of mmengine's and numpy's objects."""
    if isinstance(value, HistoryBuffer):
        log, count = (torch.from_numpy(array) for array in value.data)
        return dict(log_history=log, count_history=count, max_length=value.max_length)
    if isinstance(value, np.generic):  # a best score, for one
        return value.item()
    if isinstance(value, dict):  # the milestones of MultiStepLR are a Counter
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _history(saved: dict) -> HistoryBuffer:
    log, count = (saved[key].cpu().numpy() for key in ('log_history', 'count_history'))
    return HistoryBuffer(log, count, saved['max_length'])


class _DelayedRemoval:
    """A file backend that removes nothing until it is told to."""

    def __init__(self, backend) -> None:
        self._backend = backend
        self.removals = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def remove(self, path) -> None:
        self.removals.append(str(path))


class _AtomicRunner:
    """A runner whose checkpoints are whole files.

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

    @master_only
    def save_checkpoint(self, out_dir, filename, *args, **kwargs) -> None:
        final = osp.join(out_dir, filename)
        with whole_file(final) as partial:
            name = osp.basename(partial)
            self._runner.save_checkpoint(out_dir, name, *args, **kwargs)
        self.saved.add(final)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, without moments at which a kill loses something.

    - A checkpoint (step, best, published) is written under another name in the same
      folder, flushed to the disk and renamed: a file that has a checkpoint's name is
      whole. Partial files of a killed run are removed at the next start.
    - ``last_checkpoint`` is renamed into place as well, after the file that it names.
    - With ``max_keep_ckpts``, and for the best checkpoint, the old file is removed
      after the new one is there.
    - A published file carries the first 8 digits of its own SHA-256, the form that
      ``torch.hub`` checks.
    - Checkpoints hold tensors and plain containers alone, where mmengine stores objects
      of its own, too: every torch opens them with ``weights_only=True``. Resuming
      restores the same as from mmengine's; without this hook it leaves out the
      history of the log.

    On storage other than the local file system (``s3://`` and the like, where a file
    appears when it is complete) and with runners of other kinds (DeepSpeed's folders),
    checkpoints are written as CheckpointHook writes them.

    Args:
        **kwargs: Arguments of :class:`mmengine.hooks.CheckpointHook`.
    """

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if self._is_local(runner) and is_main_process():
            for folder in {str(self.out_dir), runner.work_dir}:
                for path in glob(osp.join(escape(folder), PARTIAL)):
                    os.remove(path)
                    runner.logger.info(
                        f'Removed {path}, left by a run that was killed.'
                    )

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        for key in ('message_hub', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = _plain(checkpoint[key])

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        hub = checkpoint.get('message_hub')
        if isinstance(hub, dict):  # a foreign file's may be anything
            scalars = hub.get('log_scalars', {})
            for key, saved in scalars.items():
                if isinstance(saved, dict):
                    scalars[key] = _history(saved)

    def _is_local(self, runner) -> bool:
        return isinstance(self.file_backend, LocalBackend) and isinstance(
            runner, Runner
        )

    @contextmanager
    def _atomic(self, runner):
        """A runner for mmengine's saving methods that leaves nothing half done."""
        if not self._is_local(runner):
            yield runner
            return
        backend = self.file_backend
        delayed = self.file_backend = _DelayedRemoval(backend)
        with TemporaryDirectory() as scratch:
            atomic = _AtomicRunner(runner, scratch)
            try:
                yield atomic
            finally:
                self.file_backend = backend
            pointer = Path(scratch, 'last_checkpoint')
            if pointer.exists():
                with whole_file(osp.join(runner.work_dir, pointer.name)) as partial:
                    Path(partial).write_bytes(pointer.read_bytes())
        for path in delayed.removals:
            # A best checkpoint of a folder that was copied is not ours to remove.
            if path not in atomic.saved and osp.dirname(path) == str(self.out_dir):
                backend.remove(path)

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
        content = io.BytesIO()
        torch.save(kept, content)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        final = f'{osp.splitext(ckpt_path)[0]}-{digest[:8]}.pth'
        with whole_file(final) as partial:
            Path(partial).write_bytes(content.getbuffer())
        runner.logger.info(
            f'{ckpt_path} is published as {final} with {sorted(kept)} (left out: '
            f'{sorted(set(checkpoint) - set(kept))}).'
        )
