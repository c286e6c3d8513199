"""Which patches a classification rests on, and a test of such maps.

- ``'gradient'``: gradient-weighted attention of Chefer et al. (Transformer
  Explainability; https://arxiv.org/abs/2103.15679, self-attention rule).
- ``'rollout'``: attention rollout of Abnar and Zuidema
  (https://arxiv.org/abs/2005.00928), which knows no class.
- ``'gradcam'``: Grad-CAM by the grad-cam package (``pip install grad-cam``).
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils import UserError, new_figure
from .recording import evaluating, patch_grid, record_attention

# Images at a time in the perturbation test.
BATCH = 64
METHODS = ('gradient', 'rollout', 'gradcam')


def class_scores(model, inputs):
    """Logits (B, classes) of normalized images (B, 3, h, w), differentiable.

    Raises:
        UserError: If the model is no classifier.
    """
    if not hasattr(model, 'backbone') or not hasattr(model, 'head'):
        raise UserError(
            f'Relevance needs an image classifier with backbone and head, got '
            f'{type(model).__name__}.'
        )
    scores = model(inputs, mode='tensor')
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2:
        raise UserError(
            f'The head {type(model.head).__name__} gives no (B, classes) scores in '
            "mode='tensor', so there is no class to explain."
        )
    return scores


def relevance_maps(model, inputs, targets=None, method='gradient'):
    """How much each patch speaks for a class.

    With A the attention of a layer, dA the gradient of the class's logit and
    E_h the mean over heads, from the first layer to the last:

        gradient:  R <- R + E_h[ (dA * A)^+ ] R        R = identity at first
        rollout:   R <- (I + E_h[A]) / 2 R

    A class token that joins late enters R as a row and a column of its own.
    The map is the class token's row of R, or the mean of the patches' rows
    where the model averages its patches. SP-SA, vanilla and other attentions
    are treated alike; a PEG's mixing of neighbours is not followed.

    Args:
        model (nn.Module): An image classifier of mmpretrain.
        inputs (Tensor): (B, 3, h, w), normalized.
        targets (Tensor | Sequence[int], optional): The class of each image.
            Defaults to None: the predicted ones.
        method (str): 'gradient', 'rollout' or 'gradcam'.
            Defaults to 'gradient'.

    Returns:
        Tensor: (B, H, W), not negative, on the grid of patches.

    Raises:
        ValueError: If ``method`` is none of these.
        UserError: If a class does not exist, or the model does not keep one grid of
            patches.
        ImportError: If 'gradcam' is asked for without the grad-cam package.
    """
    if method not in METHODS:
        raise ValueError(f'`method` must be one of {METHODS}, got {method!r}.')
    with evaluating(model), torch.enable_grad():
        if method == 'gradcam':
            return _gradcam(model, inputs, targets)
        # Also where all parameters are frozen there is a graph to follow.
        inputs = inputs.detach().requires_grad_()
        with record_attention(model) as recording:
            scores = class_scores(model, inputs)
        height, width = patch_grid(recording, model)
        maps = [m.weights for m in recording.maps]
        if method == 'gradient':
            picked = scores.gather(1, _targets(scores, targets)[:, None]).sum()
            grads = torch.autograd.grad(picked, maps, allow_unused=True)
            steps = [
                torch.zeros_like(a[:, 0]) if g is None else (g * a).clamp(min=0).mean(1)
                for a, g in zip(maps, grads, strict=True)
            ]
        else:
            steps = [a.mean(1) for a in maps]
    chain = None
    for step in steps:
        step = step.detach()
        identity = torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)
        chain = _grow(identity.expand_as(step) if chain is None else chain, step)
        if method == 'rollout':
            step = (step + identity) / 2
            chain = step @ chain
        else:
            chain = chain + step @ chain
    extra = chain.shape[-1] - height * width
    out_type = getattr(model.backbone, 'out_type', 'cls_token')
    if extra and out_type in ('cls_token', 'raw'):
        rows = chain[:, 0, extra:]
    else:
        rows = chain[:, extra:, extra:].mean(dim=1)
    return rows.unflatten(1, (height, width))


def _targets(scores, targets):
    if targets is None:
        return scores.argmax(dim=1)
    targets = torch.as_tensor(targets, device=scores.device).reshape(-1)
    if len(targets) != len(scores) or not (
        (targets >= 0).all() and (targets < scores.shape[1]).all()
    ):
        raise UserError(
            f'`targets` must be a class in 0..{scores.shape[1] - 1} for each of the '
            f'{len(scores)} images, got {targets.tolist()}.'
        )
    return targets


def _grow(chain, step):
    """Let tokens join in front: rows and columns of the identity."""
    joined = step.shape[-1] - chain.shape[-1]
    if not joined:
        return chain
    grown = F.pad(chain, (joined, 0, joined, 0))
    front = torch.arange(joined, device=chain.device)
    grown[:, front, front] = 1.0
    return grown


class _Scores(nn.Module):
    """A classifier as grad-cam wants one: images in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return class_scores(self.model, inputs)


def _gradcam(model, inputs, targets):
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError(
            "method='gradcam' needs the grad-cam package: pip install grad-cam"
        ) from error
    with torch.no_grad(), record_attention(model) as recording:
        targets = _targets(class_scores(model, inputs), targets)
    height, width = patch_grid(recording, model)

    def to_images(tokens):
        # (B, T, C) -> (B, C, H, W), without the extra tokens in front
        patches = tokens[:, tokens.shape[1] - height * width :]
        return patches.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    # The norm before the last attention: after it, no patch reaches the class.
    layer = model.backbone.layers[-1].ln1
    classes = [ClassifierOutputTarget(int(target)) for target in targets]
    with GradCAM(_Scores(model), [layer], reshape_transform=to_images) as cam:
        # grad-cam asks for gradients in place.
        maps = cam(input_tensor=inputs.detach().clone(), targets=classes)
    model.zero_grad(set_to_none=True)
    maps = torch.from_numpy(np.ascontiguousarray(maps)).to(inputs)
    return F.adaptive_avg_pool2d(maps[:, None], (height, width))[:, 0]


class Perturbation(NamedTuple):
    """The perturbation test of one method.

    Attributes:
        removed (np.ndarray): Shares of the patches that were removed, (steps).
        most (np.ndarray): Accuracy with the most relevant removed first.
        least (np.ndarray): Accuracy with the least relevant removed first.
        most_area (float): Area under ``most``; small is good.
        least_area (float): Area under ``least``; large is good.
    """

    removed: np.ndarray
    most: np.ndarray
    least: np.ndarray
    most_area: float
    least_area: float


@torch.no_grad()
def perturbation_test(model, inputs, labels, maps, steps=10):
    """Remove patches in the order of their relevance and count what stays right.

    A removed patch is set to 0, the mean colour of normalized images. The share
    removed goes from 0 to 0.9 in ``steps`` equal steps; the area under the
    accuracy is divided by that range, so that it lies in 0..1.

    Args:
        model (nn.Module): An image classifier of mmpretrain.
        inputs (Tensor): (B, 3, h, w), normalized.
        labels (Tensor): The right class of each image, (B).
        maps (Tensor): Relevance (B, H, W). Ties are removed in raster order.
        steps (int): Number of shares. Defaults to 10.

    Returns:
        Perturbation: Curves and areas.
    """
    if steps < 2:
        raise ValueError(f'`steps` must be 2 or more, got {steps}.')
    labels = torch.as_tensor(labels, device=inputs.device)
    removed = np.linspace(0, 0.9, steps)
    curves = []
    with evaluating(model):
        for descending in (True, False):
            order = maps.flatten(1).argsort(dim=1, descending=descending, stable=True)
            curve = []
            for share in removed:
                count = round(float(share) * order.shape[1])
                keep = torch.ones_like(maps).flatten(1)
                keep.scatter_(1, order[:, :count], 0.0)
                mask = F.interpolate(keep.view_as(maps)[:, None], inputs.shape[-2:])
                masks = mask.to(inputs).split(BATCH)
                parts = zip(inputs.split(BATCH), masks, strict=True)
                scores = [class_scores(model, image * part) for image, part in parts]
                right = torch.cat(scores).argmax(dim=1) == labels
                curve.append(right.float().mean().item())
            curves.append(np.array(curve))
    areas = [
        float(((c[1:] + c[:-1]) / 2 * np.diff(removed)).sum() / removed[-1])
        for c in curves
    ]
    return Perturbation(removed, *curves, *areas)


def draw_relevance(pictures, columns, captions=None):
    """Overlays: one row an image, first the image itself.

    Args:
        pictures (Sequence[np.ndarray]): Images (h, w, 3), uint8, RGB.
        columns (Sequence[Tuple[str, Tensor]]): Heading and maps (B, H, W) of
            each further column; each map is shown relative to its maximum.
        captions (Sequence[Sequence[str]], optional): Text under each overlay,
            [column][row]. Defaults to None.

    Returns:
        matplotlib.figure.Figure: The figure.
    """
    rows = len(pictures)
    figure = new_figure(2.0 * (len(columns) + 1), 2.15 * rows + 0.4)
    axes = figure.subplots(rows, len(columns) + 1, squeeze=False)
    for i, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        for ax in axes[i]:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.imshow(picture, extent=(0, width, height, 0), interpolation='nearest')
        for j, (heading, maps) in enumerate(columns):
            ax = axes[i, j + 1]
            heat = maps[i].float().cpu().numpy()
            heat = heat / max(float(heat.max()), 1e-12)
            # A dark picture, and colour only where there is relevance.
            extent = (0, width, height, 0)
            ax.imshow(picture // 2, extent=extent, interpolation='nearest')
            ax.imshow(
                heat,
                extent=extent,
                cmap='inferno',
                vmin=0,
                vmax=1,
                alpha=0.15 + 0.7 * heat,
                interpolation='bilinear',
            )
            if captions is not None:
                ax.set_xlabel(captions[j][i], fontsize='small')
            if i == 0:
                ax.set_title(heading, fontsize='small')
    axes[0, 0].set_title('image', fontsize='small')
    return figure
