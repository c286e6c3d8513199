"""Crops and flips that record what part of the image they leave to see."""

import numpy as np
import torch
from mmcv.transforms import RandomFlip
from mmpretrain.datasets.transforms import PackInputs, RandomResizedCrop
from mmpretrain.registry import TRANSFORMS


class RecordsView:
    """For transforms that keep ``token_label_view`` up to date.

    The view is (left, top, right, bottom): the coordinates of the original
    image, from 0 to 1, that the sides of the current image show. At first it is
    (0, 0, 1, 1); a horizontal flip exchanges left and right.
    """

    @staticmethod
    def narrow_view(results, left, top, right, bottom):
        """Compose the view with a part of the current image, from 0 to 1."""
        x0, y0, x1, y1 = results.get('token_label_view', (0.0, 0.0, 1.0, 1.0))
        width, height = x1 - x0, y1 - y0
        results['token_label_view'] = (
            x0 + left * width,
            y0 + top * height,
            x0 + right * width,
            y0 + bottom * height,
        )


@TRANSFORMS.register_module()
class TokenLabelRandomResizedCrop(RecordsView, RandomResizedCrop):
    """mmpretrain's RandomResizedCrop, recording its box.

    **Added Keys:** ``token_label_view``, see :class:`RecordsView`.

    Args:
        **kwargs: Those of mmpretrain's RandomResizedCrop.
    """

    def rand_crop_params(self, img):
        """The box (top, left, height, width) in pixels, kept for the record."""
        self._box = super().rand_crop_params(img)
        return self._box

    def transform(self, results):
        """Crop, resize and record."""
        height, width = results['img'].shape[:2]
        results = super().transform(results)
        top, left, box_height, box_width = self._box
        self.narrow_view(
            results,
            left / width,
            top / height,
            (left + box_width) / width,
            (top + box_height) / height,
        )
        return results


@TRANSFORMS.register_module()
class TokenLabelRandomFlip(RecordsView, RandomFlip):
    """mmcv's RandomFlip, recording the flip.

    **Added Keys:** ``token_label_view``, see :class:`RecordsView`.

    Args:
        **kwargs: Those of mmcv's RandomFlip.
    """

    def transform(self, results):
        """Flip and record."""
        results = super().transform(results)
        left, top, right, bottom = 0.0, 0.0, 1.0, 1.0
        if results['flip_direction'] in ('horizontal', 'diagonal'):
            left, right = right, left
        if results['flip_direction'] in ('vertical', 'diagonal'):
            top, bottom = bottom, top
        self.narrow_view(results, left, top, right, bottom)
        return results


@TRANSFORMS.register_module()
class PackTokenLabelInputs(PackInputs):
    """mmpretrain's PackInputs, with the label map and the view.

    The data sample gains ``token_label`` (2, K, h, w), ``token_label_view``
    (4, ), float32, and, as meta information, ``num_classes``. The targets are made
    of them on the model's device: a worker hands over kilobytes, not the
    classes x tokens values of an image.

    Args:
        **kwargs: Those of mmpretrain's PackInputs.
    """

    def transform(self, results):
        """Pack."""
        if 'token_label' not in results:
            raise ValueError(
                'PackTokenLabelInputs found no `token_label`: the data must come from '
                'TokenLabelDataset. For data without label maps use PackInputs.'
            )
        packed = super().transform(results)
        sample = packed['data_samples']
        view = results.get('token_label_view', (0.0, 0.0, 1.0, 1.0))
        sample.token_label = results['token_label']
        sample.token_label_view = torch.from_numpy(np.asarray(view, dtype=np.float32))
        if 'num_classes' not in sample:
            sample.set_metainfo(dict(num_classes=results['num_classes']))
        return packed
