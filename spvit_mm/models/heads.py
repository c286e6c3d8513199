"""Token labeling: a class head, a head on every patch token, and their targets.

Paper: "All Tokens Matter: Token Labeling for Training Better Vision
Transformers" (LV-ViT), NeurIPS 2021, https://arxiv.org/abs/2104.10858
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.evaluation.metrics import Accuracy
from mmpretrain.models.heads import VisionTransformerClsHead
from mmpretrain.registry import MODELS
from torchvision.ops import roi_align


def swap_tokens(x, mask):
    """Exchange the marked tokens with those of the batch in reverse order.

    Done twice it gives back what came in.

    Args:
        x (Tensor): (B, N, C).
        mask (Tensor): (N, ), True where the tokens change places.

    Returns:
        Tensor: (B, N, C); sample i has the marked tokens of sample B-1-i.
    """
    return torch.where(mask[None, :, None], x.flip(0), x)


def crop_label_maps(label_maps, views, num_classes, hw):
    """Class distributions of what a training crop shows, one for each token.

    The map's scores stand at their classes, 0 at all others; RoIAlign samples
    them at the tokens, and softmax over the classes makes a distribution:

        P = softmax(RoIAlign(scatter(scores), view))

    The released code hands RoIAlign the box as (top, left, bottom, right)
    where it takes (x1, y1, x2, y2), and so sees the crop transposed. This is
    the crop as it is. (``aligned=True`` is the half-pixel shift that the
    released code subtracts itself; a box below one cell keeps its size.)

    Args:
        label_maps (Tensor): (B, 2, K, h, w): scores, then class ids.
        views (Tensor): (B, 4), the coordinates (left, top, right, bottom) of
            the original image, from 0 to 1, that the crop's sides show. After a
            flip left > right.
        num_classes (int): Number C of classes.
        hw (Tuple[int, int]): The grid (H, W) of the output.

    Returns:
        Tensor: (B, C, H, W), at least float32.

    Raises:
        ValueError: If a class id lies outside 0..num_classes-1.
    """
    batch, _, _, height, width = label_maps.shape
    scores, ids = label_maps[:, 0], label_maps[:, 1].long()
    # On an accelerator the check would wait for the device in every iteration;
    # there scatter_ itself asserts, and data sets check their maps anyway.
    if ids.device.type == 'cpu' and not 0 <= ids.min() <= ids.max() < num_classes:
        raise ValueError(
            f'The label maps hold class ids {ids.min()}..{ids.max()}, but the head '
            f'has num_classes={num_classes}. Set it to the number of classes of the '
            'teacher that made the maps.'
        )
    scores = _at_least_float32(scores)
    dense = scores.new_zeros(batch, num_classes, height, width).scatter_(1, ids, scores)

    left, top, right, bottom = views.to(scores).unbind(1)
    boxes = torch.stack(
        (
            torch.arange(batch, device=scores.device, dtype=scores.dtype),
            torch.minimum(left, right) * width,
            torch.minimum(top, bottom) * height,
            torch.maximum(left, right) * width,
            torch.maximum(top, bottom) * height,
        ),
        dim=1,
    )
    crops = roi_align(dense, boxes, tuple(hw), sampling_ratio=-1, aligned=True)
    crops = torch.where((left > right)[:, None, None, None], crops.flip(3), crops)
    crops = torch.where((top > bottom)[:, None, None, None], crops.flip(2), crops)
    return crops.softmax(dim=1)


def token_label_targets(label_maps, views, num_classes, hw, smoothing=0.1):
    """Targets of the class token and of every patch token.

    As published: t = P * on + off, where off = smoothing / C and
    on = 1 - smoothing + off; for the class token P is the crop as one cell.

    Args:
        label_maps (Sequence[Tensor]): B maps (2, K, h, w), of any sizes.
        views (Tensor): (B, 4), see :func:`crop_label_maps`.
        num_classes (int): Number C of classes.
        hw (Tuple[int, int], optional): The grid (H, W) of the tokens. None for
            the class token's target alone.
        smoothing (float): Label smoothing. Defaults to 0.1.

    Returns:
        Tuple[Tensor, Tensor | None]: (B, C) and (B, H * W, C).
    """
    off = smoothing / num_classes
    on = 1 - smoothing + off
    shapes = [tuple(label_map.shape) for label_map in label_maps]
    cls_target = dense_target = None
    # One pass, unless some maps are stand-ins for images that have none.
    for shape in sorted(set(shapes)):
        index = [i for i, other in enumerate(shapes) if other == shape]
        # (torch.stack refuses halves under the CPU's autocast.)
        maps = torch.stack([_at_least_float32(label_maps[i]) for i in index])
        index = torch.tensor(index, device=views.device)
        cls_part = crop_label_maps(maps, views[index], num_classes, (1, 1))
        cls_part = cls_part.flatten(1) * on + off
        if cls_target is None:
            cls_target = cls_part.new_empty(len(shapes), num_classes)
        cls_target[index] = cls_part
        if hw is None:
            continue
        dense_part = crop_label_maps(maps, views[index], num_classes, hw)
        dense_part = dense_part.flatten(2).transpose(1, 2) * on + off
        if dense_target is None:
            dense_target = dense_part.new_empty(len(shapes), *dense_part.shape[1:])
        dense_target[index] = dense_part
    return cls_target, dense_target


@MODELS.register_module()
class TokenLabelClsHead(VisionTransformerClsHead):
    """A head on the class token and one on every patch token.

    Training minimises

        cls_weight * SCE(cls, y) + dense_weight * mean over tokens SCE(aux_n, t_n)

    with the soft cross entropy SCE(z, t) = -sum t log softmax(z). The targets y
    and t_n come from the image's label map (``token_label`` and
    ``token_label_view`` of a data sample). Without maps and with
    ``dense_weight=0`` y is the smoothed image label.

    At test time the scores are cls + test_dense_weight * max over tokens of aux.

    Args:
        num_classes (int): Number of classes.
        in_channels (int): Width of the tokens.
        dense_weight (float): Weight of the tokens' loss. 0 builds no auxiliary
            head. Defaults to 1.
        cls_weight (float): Weight of the class token's loss. Defaults to 1.
        label_smooth_val (float): Label smoothing in [0, 1). Defaults to 0.1.
        test_scores (str): ``'cls+dense'`` or ``'cls'``, the class token alone.
            Defaults to 'cls+dense'.
        test_dense_weight (float): Weight of the tokens in the test scores.
            Defaults to 0.5.
        num_extra_tokens (int): Tokens before the patches, the class token being
            the first. Defaults to 1.
        loss (dict): A loss that takes soft targets. It must not smooth again.
            Defaults to ``dict(type='CrossEntropyLoss', use_soft=True)``.
        init_cfg (dict): Defaults to a truncated normal of std 0.02.
        **kwargs: ``hidden_dim``, ``act_cfg``, ``topk``, ``cal_acc`` of
            mmpretrain's VisionTransformerClsHead.

    Raises:
        ValueError: For a negative weight, a smoothing outside [0, 1), or an
            unknown ``test_scores``.
    """

    TEST_SCORES = ('cls+dense', 'cls')

    def __init__(
        self,
        num_classes,
        in_channels,
        dense_weight=1.0,
        cls_weight=1.0,
        label_smooth_val=0.1,
        test_scores='cls+dense',
        test_dense_weight=0.5,
        num_extra_tokens=1,
        loss=dict(type='CrossEntropyLoss', use_soft=True),  # noqa: B006
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),  # noqa: B006
        **kwargs,
    ):
        for name, value in (('dense_weight', dense_weight), ('cls_weight', cls_weight)):
            if value < 0:
                raise ValueError(f'`{name}` must not be negative, got {value}.')
        if not 0 <= label_smooth_val < 1:
            raise ValueError(
                f'`label_smooth_val` must lie in [0, 1), got {label_smooth_val}.'
            )
        if test_scores not in self.TEST_SCORES:
            raise ValueError(
                f'`test_scores` must be one of {self.TEST_SCORES}, got {test_scores!r}.'
            )
        super().__init__(
            num_classes, in_channels, loss=loss, init_cfg=init_cfg, **kwargs
        )
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight
        self.label_smooth_val = label_smooth_val
        self.test_scores = test_scores
        self.test_dense_weight = test_dense_weight
        self.num_extra_tokens = num_extra_tokens
        self.aux_head = nn.Linear(in_channels, num_classes) if dense_weight else None

    def pre_logits(self, feats):
        """The class token (B, in_channels) before the last linear layer.

        Args:
            feats (Tuple[Tensor]): The last is (B, T, C) as of
                ``out_type='raw'``, or (B, C).
        """
        feat = feats[-1]
        if feat.ndim not in (2, 3):
            raise ValueError(
                f'TokenLabelClsHead takes features (B, T, C) or (B, C), got '
                f"{tuple(feat.shape)}. Set the backbone's `out_type` to 'raw' (or to "
                "'cls_token' with dense_weight=0)."
            )
        return super().pre_logits((feat[:, 0] if feat.ndim == 3 else feat,))

    def dense_scores(self, feats):
        """Class scores of the patch tokens, (B, N, num_classes)."""
        feat = feats[-1]
        if feat.ndim != 3:
            raise ValueError(
                f'The auxiliary head takes tokens (B, T, C), got features '
                f"{tuple(feat.shape)}. Set the backbone's `out_type` to 'raw', or "
                '`dense_weight` to 0.'
            )
        return self.aux_head(feat[:, self.num_extra_tokens :])

    def forward(self, feats):
        """Test scores (B, num_classes)."""
        cls_score = self.layers.head(self.pre_logits(feats))
        if self.aux_head is None or self.test_scores == 'cls':
            return cls_score
        return cls_score + self.test_dense_weight * self.dense_scores(feats).amax(dim=1)

    def loss(self, feats, data_samples, hw=None, mix_mask=None, **kwargs):
        """Losses of the class token and of the patch tokens.

        Args:
            feats (Tuple[Tensor]): The last is (B, T, C), or (B, C) where there
                is no auxiliary head.
            data_samples (List[DataSample]): With ``token_label`` (2, K, h, w)
                and ``token_label_view`` (4, ), or with ``gt_label``.
            hw (Tuple[int, int], optional): The grid of the tokens; needed by
                the auxiliary head.
            mix_mask (Tensor, optional): (N, ), the tokens that MixToken has
                exchanged with the reversed batch. Defaults to None.

        Returns:
            Dict[str, Tensor]: ``loss_cls`` and, with an auxiliary head,
            ``loss_dense``.

        Raises:
            ValueError: If label maps are missing, or were made for another
                number of classes.
        """
        cls_score = self.layers.head(self.pre_logits(feats))
        with torch.no_grad():
            cls_target, dense_target = self._targets(
                data_samples, hw, feats[-1].shape, cls_score
            )
            if mix_mask is not None:
                lam = 1 - mix_mask.to(cls_target.dtype).mean()
                cls_target = lam * cls_target + (1 - lam) * cls_target.flip(0)

        # Soft targets are sums of many small terms: not in half precision.
        losses = dict(
            loss_cls=self.cls_weight
            * self.loss_module(
                _at_least_float32(cls_score),
                cls_target,
                avg_factor=len(cls_target),
                **kwargs,
            )
        )
        if self.aux_head is not None:
            dense_score = self.dense_scores(feats)
            if mix_mask is not None:
                dense_score = swap_tokens(dense_score, mix_mask)
            dense_score = _at_least_float32(dense_score).flatten(0, 1)
            losses['loss_dense'] = self.dense_weight * self.loss_module(
                dense_score,
                dense_target.flatten(0, 1),
                avg_factor=len(dense_score),
                **kwargs,
            )
        if self.cal_acc:
            label = torch.cat([sample.gt_label for sample in data_samples])
            accuracy = Accuracy.calculate(cls_score, label, topk=self.topk)
            losses.update(
                {
                    f'accuracy_top-{k}': a
                    for k, a in zip(self.topk, accuracy, strict=True)
                }
            )
        return losses

    def _targets(self, data_samples, hw, shape, like):
        """Targets on the device of ``like``: (B, C), and (B, N, C) or None."""
        num_maps = sum('token_label' in sample for sample in data_samples)
        if num_maps in (0, len(data_samples)) and (num_maps or self.aux_head is None):
            if not num_maps:
                return self._image_targets(data_samples, like), None
        else:
            raise ValueError(
                f'{len(data_samples) - num_maps} of {len(data_samples)} data samples '
                'have no label map (`token_label`). Read the data with '
                'TokenLabelDataset and pack it with PackTokenLabelInputs, or set '
                '`dense_weight=0` for data without label maps.'
            )
        for sample in data_samples:
            found = sample.get('num_classes')
            if found is not None and found != self.num_classes:
                raise ValueError(
                    f'The label maps are of a data set of {found} classes, but the '
                    f'head has num_classes={self.num_classes}.'
                )
        if self.aux_head is None:
            hw = None
        elif hw is None or shape[1] - self.num_extra_tokens != hw[0] * hw[1]:
            raise ValueError(
                f'The features hold {shape[1] - self.num_extra_tokens} patch tokens '
                f'({self.num_extra_tokens} extra), which do not make the grid `hw`={hw}.'
            )
        return token_label_targets(
            [sample.token_label.to(like.device) for sample in data_samples],
            torch.stack([s.token_label_view for s in data_samples]).to(like.device),
            self.num_classes,
            hw,
            self.label_smooth_val,
        )

    def _image_targets(self, data_samples, like):
        if 'gt_score' in data_samples[0]:
            target = torch.stack([sample.gt_score for sample in data_samples])
        else:
            target = torch.cat([sample.gt_label for sample in data_samples])
            target = F.one_hot(target, self.num_classes)
        target = target.to(device=like.device, dtype=torch.float32)
        smoothing = self.label_smooth_val
        return target * (1 - smoothing) + smoothing / self.num_classes


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
