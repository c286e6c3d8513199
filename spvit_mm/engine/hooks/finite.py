import math
from typing import Optional

from mmengine.hooks import Hook
from mmpretrain.registry import HOOKS

from ...utils import UserError, first_not_finite, unwrap_model


def _path(sample, number: int) -> str:
    return getattr(sample, 'img_path', None) or f'image {number}'


def _scores(sample):
    """What a classifier or a segmentor says of an image, None for others."""
    logits = getattr(getattr(sample, 'seg_logits', None), 'data', None)
    return getattr(sample, 'pred_score', logits)


def _named_images(data_batch: Optional[dict]):
    """The images of a batch as they were loaded, each with its path or number."""
    batch = data_batch if isinstance(data_batch, dict) else {}
    images, samples = batch.get('inputs', ()), batch.get('data_samples') or ()
    for i, image in enumerate(images):
        sample = samples[i] if i < len(samples) else None
        yield _path(sample, i), image


@HOOKS.register_module()
class FiniteHook(Hook):
    """Stop at the first loss or weight that is no finite number, and name it.

    A training goes on with a loss of nan, to its last epoch, and a model with such
    weights is tested to an accuracy of chance.

    The losses are read where mmengine has logged them, so that an accelerator is waited
    for no more often in training than without this hook. The weights are looked at after
    they were loaded and before each checkpoint, which then is not written: the last good
    one stays the latest. The scores of validation and testing are looked at, too.

    Raises:
        UserError: It names the loss, or the first weight or image that is not finite or
            has such scores.
    """

    def before_train(self, runner) -> None:
        name = first_not_finite(unwrap_model(runner.model).state_dict().items())
        if name is not None:
            origin = runner.cfg.get('load_from')
            raise UserError(
                f'{name} holds nan or infinity before the first step. '
                + (
                    f'Is that so in {origin}? Take an earlier checkpoint.'
                    if origin
                    else 'Look for the arguments of that part in the model config.'
                )
            )

    before_test = before_train

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        # RuntimeInfoHook, which comes first, has fetched their values.
        logged = runner.message_hub.log_scalars
        losses = {
            name: logged[f'train/{name}'].current()
            for name in outputs or ()
            if 'loss' in name and f'train/{name}' in logged
        }
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if not bad:
            return
        where = first_not_finite(_named_images(data_batch))
        if where is not None:
            cause = (
                f'So is {where} of the batch, before the data_preprocessor: look for '
                'the file, or for a transform that divides by 0.'
            )
        else:
            # The step has been made with it.
            weight = first_not_finite(unwrap_model(runner.model).named_parameters())
            cause = (
                'The images of the batch are finite; the first weight that is not, '
                f'after this step, is {weight}.'
            )
            cause += (
                ' Lower the learning rate, lengthen its warm-up or clip the gradients '
                '(optim_wrapper.clip_grad).'
            )
        values = ', '.join(f'{name} {losses[name]}' for name in bad)
        raise UserError(
            f'The loss of iteration {runner.iter + 1} is not finite ({values}). {cause}'
        )

    def after_val_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[list] = None,
    ) -> None:
        # The evaluator, which comes first, has fetched them.
        scores = (
            (_path(sample, i), _scores(sample)) for i, sample in enumerate(outputs)
        )
        where = first_not_finite(scores)
        if where is not None:
            raise UserError(
                f'The scores of {where} hold nan or infinity, and the weights do not: '
                'a number in between was too large. Test without --amp, or take an '
                'earlier checkpoint.'
            )

    after_test_iter = after_val_iter

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        name = first_not_finite(checkpoint.get('state_dict', {}).items())
        if name is not None:
            raise UserError(
                f'{name} has become nan or infinity by iteration {runner.iter}: the '
                'training diverged, and no checkpoint of that is written. Lower the '
                'learning rate, lengthen its warm-up or clip the gradients '
                '(optim_wrapper.clip_grad), and resume from the checkpoint before.'
            )
