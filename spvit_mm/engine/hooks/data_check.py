import torch
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop
from mmpretrain.registry import HOOKS

from ...datasets import checks
from ...utils import unwrap_model


def _restart_workers(loop) -> None:
    """Let workers that an iteration loop has started see its changed data set.

    mmengine's loop starts them when it is built, its fork's with the first batch.
    """
    iterator = getattr(loop, 'dataloader_iterator', None)
    if loop.dataloader.num_workers and getattr(iterator, '_iterator', None):
        loop.dataloader._iterator = None
        # The weights are still to be drawn, and are not to depend on this.
        with torch.random.fork_rng(devices=[]):
            loop.dataloader_iterator = type(iterator)(loop.dataloader)


@HOOKS.register_module(name=['DataCheckHook', 'SegDataCheckHook'])
class DataCheckHook(Hook):
    """Check the data before the first step, and every image and mask as it is read.

    For classification and segmentation alike; ``SegDataCheckHook`` is its second name.

    Args:
        corrupt_images (str): ``'error'``: an image that cannot be read ends the run
            with its file name. ``'skip'``: training draws another image in its
            place, names the file in the log and counts; validation and testing still
            end, since their figures would be those of other data.
            Defaults to 'error'.

    Raises:
        UserError: Before the first step, for what :func:`~spvit_mm.datasets.checks.
            check_dataset`, ``check_same_classes``, ``check_heads``, ``check_crops`` and
            ``check_masks`` find. While loading, for images that cannot be read or do
            not hold one patch, and for masks of another size than their image or with
            values that the head does not have.
    """

    def __init__(self, corrupt_images: str = 'error') -> None:
        if corrupt_images not in ('error', 'skip'):
            raise ValueError(
                f"corrupt_images must be 'error' or 'skip', got {corrupt_images!r}"
            )
        self.skip = corrupt_images == 'skip'
        self._skipped = None
        self._reported = 0

    def before_run(self, runner) -> None:
        model = unwrap_model(runner.model)
        # Segmentors have that of their last head.
        head = getattr(model, 'head', None) or model
        num_classes = getattr(head, 'num_classes', None)
        loops = {
            'training': runner._train_loop,
            'validation': runner._val_loop,
            'test': runner._test_loop,
        }
        datasets = {
            split: loop.dataloader.dataset
            for split, loop in loops.items()
            if isinstance(loop, BaseLoop)
        }
        checks.check_heads(model)
        checks.check_crops(model, *datasets.values())
        for split, dataset in datasets.items():
            checks.check_dataset(dataset, split, num_classes)
            left_out = checks.describe_left_out(dataset, split)
            if left_out:
                runner.logger.warning(left_out)
            training = split == 'training'
            skipped = checks.guard_files(dataset, num_classes, self.skip and training)
            checks.check_masks(dataset, split, num_classes)
            if training:
                self._skipped = skipped
                _restart_workers(loops[split])
            elif 'training' in datasets:
                checks.check_same_classes(datasets['training'], dataset, split)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        checks.check_batch(unwrap_model(runner.model), data_batch)

    before_val_iter = before_test_iter = before_train_iter

    def after_train_epoch(self, runner, checkpoint=None) -> None:
        count = int(self._skipped) if self._skipped is not None else 0
        if count > self._reported:
            # mmengine's logger shows the warnings of the first process alone.
            several = runner.world_size > 1
            where = f' by the first of {runner.world_size} processes' if several else ''
            runner.logger.warning(
                f'{count} images that could not be read were left out so far{where} '
                '(each time that one is drawn counts); they are named above.'
            )
            self._reported = count

    # An iteration loop has a single epoch, whose end can be days away.
    before_val_epoch = before_save_checkpoint = after_train_epoch
