from mmengine.hooks import Hook
from mmengine.runner import BaseLoop
from mmpretrain.registry import HOOKS

from ...utils import unwrap_model
from ..seg_checks import check_crops, check_seg_dataset


@HOOKS.register_module()
class SegDataCheckHook(Hook):
    """Check segmentation data before the first step, and every mask as it is read.

    Raises:
        UserError: For a split without images, images or masks that are missing, and
            crops smaller than a patch; while loading, for masks of another size than
            their image or with values that the head does not have. It names the file.
    """

    def before_run(self, runner) -> None:
        model = unwrap_model(runner.model)
        num_classes = getattr(getattr(model, 'decode_head', None), 'num_classes', None)
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
        check_crops(model, *datasets.values())
        for split, dataset in datasets.items():
            check_seg_dataset(dataset, split, num_classes)
