from mmengine.hooks import Hook
from mmengine.runner import BaseLoop
from mmpretrain.registry import HOOKS

from ...utils import unwrap_model
from ..data_checks import (
    check_dataset,
    check_normalization,
    check_same_classes,
    check_widths,
    guard_images,
)


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Check the data sets before the first step, and name images that are corrupt.

    Args:
        corrupt_images (str): ``'error'``: an image that cannot be read ends the run
            with its file name. ``'skip'``: training draws another image in its
            place, names the file in the log and counts; validation and testing still
            end, since their figures would be those of other data.
            Defaults to 'error'.

    Raises:
        UserError: For data sets without images, of a single class, with labels that
            the head does not have, or whose folders number the classes differently;
            for a head of another width than the backbone; and for a mean or std of
            another number of channels than the backbone takes.
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
        check_widths(model)
        check_normalization(model)
        num_classes = getattr(getattr(model, 'head', None), 'num_classes', None)
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
        for split, dataset in datasets.items():
            check_dataset(dataset, split, num_classes)
            skipped = guard_images(dataset, self.skip)
            if split == 'training':
                self._skipped = skipped
            elif 'training' in datasets:
                check_same_classes(datasets['training'], dataset, split)

    def after_train_epoch(self, runner) -> None:
        count = int(self._skipped) if self._skipped is not None else 0
        if count > self._reported:
            runner.logger.warning(
                f'{count} images that could not be read were left out so far '
                '(each time that one is drawn counts); they are named above.'
            )
            self._reported = count
