"""The absolute position embedding on any grid, and the rescaling of coordinates.

An embedding is a tensor (1, extra + H * W, C): one entry for the class token where
that comes first, then one for each patch of the grid (H, W), row by row.
"""

import math

import torch
import torch.nn.functional as F
from mmpretrain.models.utils import resize_pos_embed

from ..ops.compat import is_free
from ..utils import CheckpointError
from .priors import SpatialPrior
from .priors.base import COORDS_OF_A_GRID


def draw_rescale(rescale, jitter, device):
    """Random factors of the coordinates for one step of training.

    As DINOv3 draws them for its rotary embedding (https://arxiv.org/abs/2508.10104):
    one factor log-uniform in [1 / rescale, rescale] for both axes, times one for each
    axis in [1 / jitter, jitter], from torch's default generator of the device.

    Args:
        rescale (float, optional): At least 1; None is 1.
        jitter (float, optional): At least 1; None is 1.
        device (torch.device): Where to draw.

    Returns:
        Tensor: (2,), the factors of x and y.
    """
    power = torch.zeros(2, device=device)
    if rescale is not None:
        power = power + (2 * torch.rand(1, device=device) - 1) * math.log(rescale)
    if jitter is not None:
        power = power + (2 * torch.rand(2, device=device) - 1) * math.log(jitter)
    return power.exp()


def guess_grid(length, own_length, own_grid):
    """The grid of an embedding whose checkpoint does not say it.

    Args:
        length (int): Entries of the embedding.
        own_length (int): Entries of the model that loads it.
        own_grid (Tuple[int, int]): The grid (H, W) of that model.

    Returns:
        Tuple[int, int]: ``own_grid`` for as many entries as there; else the square of
        this length, with a class token or without; where there is none, ``own_grid``.
    """
    if length == own_length:
        return tuple(own_grid)
    for extra in (1, 0):
        side = math.isqrt(length - extra)
        if side > 0 and side * side == length - extra:
            return side, side
    return tuple(own_grid)


def split_pos_embed(pos_embed, grid):
    """Separate the class token's entry from those of the patches.

    Args:
        pos_embed (Tensor): (1, extra + H * W, C).
        grid (Tuple[int, int]): The grid (H, W).

    Returns:
        Tuple[Optional[Tensor], Tensor]: The class token's entry (1, 1, C), None if
        there is none, and the patches' (1, H * W, C).

    Raises:
        CheckpointError: If there is more than one extra entry, or fewer than patches.
    """
    length, num_patches = pos_embed.shape[1], grid[0] * grid[1]
    if length not in (num_patches, num_patches + 1):
        raise CheckpointError(
            f'The checkpoint has a `pos_embed` of {length} entries for a grid of '
            f'{grid[0]} x {grid[1]} = {num_patches} patches; SPViT takes '
            'none or one more, for the class token. (Distilled DeiT has two.)'
        )
    if length == num_patches:
        return None, pos_embed
    return pos_embed[:, :1], pos_embed[:, 1:]


def patch_entries(pos_embed, grid, hw, mode, num_extra_tokens):
    """The entries of the patches, resized to another grid where that is another.

    Args:
        pos_embed (Tensor): (1, num_extra_tokens + H * W, C).
        grid (Tuple[int, int]): Its grid (H, W).
        hw (Tuple[int, int]): The other grid (H', W').
        mode (str): 'bicubic' or 'bilinear'.
        num_extra_tokens (int): Entries in front of the patches'.

    Returns:
        Tensor: (1, H' * W', C).
    """
    if not is_free(hw):
        resized = resize_pos_embed(pos_embed, grid, hw, mode, num_extra_tokens)
        return resized[:, num_extra_tokens:]
    # Resized in any case, since the grids cannot be compared; to its own grid this
    # changes nothing.
    entries = pos_embed[:, num_extra_tokens:].unflatten(1, grid).permute(0, 3, 1, 2)
    resized = F.interpolate(entries.float(), hw, mode=mode).to(entries.dtype)
    return resized.flatten(2).transpose(1, 2)


def fit_pos_embed(pos_embed, grid, own_grid, with_cls_entry, mode='bicubic'):
    """The embedding of one model in the shape of another's.

    Args:
        pos_embed (Tensor): (1, extra + H * W, C) of a checkpoint.
        grid (Tuple[int, int]): Its grid (H, W).
        own_grid (Tuple[int, int]): The grid (H', W') of the model that loads it.
        with_cls_entry (bool): Whether that model has an entry for the class token.
            One that the checkpoint lacks becomes 0.
        mode (str): 'bicubic' or 'bilinear'. Defaults to 'bicubic'.

    Returns:
        Tuple[Tensor, Optional[Tensor], List[str]]: The embedding (1, extra' + H' *
        W', C), the class token's entry (1, 1, C) that has no place in it (None if
        there is none), and a sentence for each change.
    """
    cls_entry, patches = split_pos_embed(pos_embed, grid)
    changes = []
    if tuple(grid) != tuple(own_grid):
        patches = resize_pos_embed(patches, grid, own_grid, mode, 0)
        changes.append(f'Resize the pos_embed from {grid} to {tuple(own_grid)}.')
    if not with_cls_entry:
        return patches, cls_entry, changes
    if cls_entry is None:
        cls_entry = torch.zeros_like(patches[:, :1])
        changes.append(
            'The checkpoint has no position entry for the class token: 0 is taken.'
        )
    return torch.cat((cls_entry, patches), dim=1), None, changes


def fit_state_dict(state_dict, prefix, model):
    """Fit the position and the grid in a checkpoint to an SPViT, in place.

    The grid of the checkpoint's training goes to the priors that it holds, which scale
    or clamp their offsets by it.

    Args:
        state_dict (dict): The checkpoint's weights.
        prefix (str): What stands before the model's names in it.
        model (SPViT): The model that loads it.

    Returns:
        List[str]: A sentence for each change.
    """
    name, grid_name, cls_name = (
        prefix + key for key in ('pos_embed', 'train_grid', 'cls_token')
    )
    if grid_name not in state_dict and name not in state_dict:
        return []
    own_grid = tuple(model.patch_resolution)
    if grid_name in state_dict:
        grid = tuple(state_dict[grid_name].tolist())
    else:
        own_length = -1 if model.pos_embed is None else model.pos_embed.shape[1]
        grid = guess_grid(state_dict[name].shape[1], own_length, own_grid)
    for child_name, child in model.named_modules():
        if isinstance(child, SpatialPrior) and child.coords in COORDS_OF_A_GRID:
            own = f'{prefix}{child_name}.'
            # A prior that the checkpoint does not hold is new, and has its own grid.
            trained = any(key.startswith(own) for key in state_dict)
            theirs = torch.tensor(grid) if trained else child.train_grid
            state_dict.setdefault(f'{own}train_grid', theirs)
    state_dict[grid_name] = model.train_grid.detach().clone()
    if name not in state_dict:
        return []
    if model.pos_embed is None:
        del state_dict[name]
        return ['The checkpoint has a pos_embed, this model none: left out.']

    state_dict[name], cls_entry, changes = fit_pos_embed(
        state_dict[name],
        grid,
        own_grid,
        model.num_pos_extra_tokens > 0,
        model.interpolate_mode,
    )
    if cls_entry is None:
        return changes
    if model.with_cls_token and cls_name in state_dict:
        state_dict[cls_name] = state_dict[cls_name] + cls_entry
        change = (
            'The class token joins late here and has no position: its entry in '
            "the checkpoint's pos_embed is added to cls_token."
        )
    else:
        change = "The class token's entry in the checkpoint's pos_embed is left out."
    return [*changes, change]
