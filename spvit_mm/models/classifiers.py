"""The classifier that trains with token labels and MixToken (LV-ViT)."""

import numpy as np
import torch
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.utils.batch_augments import CutMix
from mmpretrain.registry import MODELS

from ..utils import safe_loader
from .heads import TokenLabelClsHead, swap_tokens


@MODELS.register_module()
class TokenLabelClassifier(ImageClassifier):
    """Image classifier with MixToken, for a :class:`TokenLabelClsHead`.

    MixToken (https://arxiv.org/abs/2104.10858) is CutMix behind the stem: a box
    of 1 - lam of the token grid, lam ~ Beta(alpha, alpha), is exchanged with the
    batch in reverse order. The tokens' scores are exchanged back before their
    loss, the class target is lam * y + (1 - lam) * y_reversed with lam counted
    from the box.

    Args:
        backbone (dict): An :class:`SPViT`. With a head on the tokens its
            ``out_type`` must be 'raw'.
        head (dict): A :class:`TokenLabelClsHead`.
        mix_token_alpha (float): Parameter of the Beta distribution; 0 switches
            MixToken off. Defaults to 1.
        mix_token_prob (float): Share of the batches that are mixed.
            Defaults to 1.
        **kwargs: ``train_cfg``, ``data_preprocessor``, ``pretrained``,
            ``init_cfg`` of mmpretrain's ImageClassifier.

    Raises:
        ValueError: If the backbone has no seam behind its stem or gives no
            tokens to a head that wants them, or a number is out of range.

    Example:
        >>> import spvit_mm
        >>> from mmpretrain.registry import MODELS
        >>> model = MODELS.build(dict(
        ...     type='TokenLabelClassifier',
        ...     backbone=dict(type='SPViT', arch='spvit-small', out_type='raw'),
        ...     head=dict(type='TokenLabelClsHead', num_classes=1000,
        ...               in_channels=384)))
    """

    def __init__(
        self, backbone, head, mix_token_alpha=1.0, mix_token_prob=1.0, **kwargs
    ):
        if mix_token_alpha < 0:
            raise ValueError(
                f'`mix_token_alpha` must not be negative, got {mix_token_alpha}.'
            )
        if not 0 <= mix_token_prob <= 1:
            raise ValueError(
                f'`mix_token_prob` must lie in 0..1, got {mix_token_prob}.'
            )
        super().__init__(backbone, head=head, **kwargs)
        self.mix_token_prob = mix_token_prob if mix_token_alpha else 0.0
        self.cutmix = CutMix(alpha=mix_token_alpha) if mix_token_alpha else None
        self._check_children()

    def _check_children(self):
        if not hasattr(self.backbone, 'forward_stem'):
            raise ValueError(
                'TokenLabelClassifier mixes tokens behind the stem and needs a '
                '`backbone` with forward_stem and forward_layers, as SPViT; got '
                f'{type(self.backbone).__name__}.'
            )
        if not isinstance(self.head, TokenLabelClsHead):
            raise ValueError(
                f'`head` must be a TokenLabelClsHead, got {type(self.head).__name__}.'
            )
        out_type = self.backbone.out_type
        if self.head.aux_head is not None:
            if out_type != 'raw' or not self.backbone.with_cls_token:
                raise ValueError(
                    "A head on the tokens needs a `backbone` with out_type='raw' and "
                    f'a class token, got out_type={out_type!r} and with_cls_token='
                    f'{self.backbone.with_cls_token}. Or set `dense_weight=0`.'
                )
        elif out_type == 'featmap' or (
            out_type == 'raw' and not self.backbone.with_cls_token
        ):
            raise ValueError(
                'With dense_weight=0 the head takes a `backbone` with out_type='
                "'cls_token' or 'avg_featmap', or 'raw' with a class token; got "
                f'out_type={out_type!r}.'
            )
        elif out_type == 'raw' and self.backbone.layers[-1].peg is not None:
            # Only the class token is read, which passes the last PEG untouched:
            # a parameter without a gradient, over which DDP would stumble.
            for param in self.backbone.layers[-1].peg.parameters():
                param.requires_grad = False

    def init_weights(self):
        """Initialize; a pretrained file is opened by ``spvit_mm.utils.safe_loader``."""
        with safe_loader(trust=None):
            super().init_weights()

    def loss(self, inputs, data_samples):
        """Losses of a batch of images (B, 3, h, w)."""
        x, hw = self.backbone.forward_stem(inputs)
        mask = self._mix_mask(hw, x.device)
        if mask is not None:
            x = swap_tokens(x, mask)
        feats = self.backbone.forward_layers(x, hw)
        if self.with_neck:
            feats = self.neck(feats)
        return self.head.loss(feats, data_samples, hw=hw, mix_mask=mask)

    def _mix_mask(self, hw, device):
        """The tokens (H * W, ) that change places, None to leave all as is."""
        if not self.training or np.random.rand() >= self.mix_token_prob:
            return None
        alpha = self.cutmix.alpha
        lam = np.random.beta(alpha, alpha)
        (top, bottom, left, right), _ = self.cutmix.cutmix_bbox_and_lam(hw, lam)
        mask = torch.zeros(hw, dtype=torch.bool, device=device)
        mask[top:bottom, left:right] = True
        return mask.flatten()
