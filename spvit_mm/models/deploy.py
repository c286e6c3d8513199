"""The deploy form: priors folded into tables of constants for one grid."""

from ..utils import UserError
from .attention import SpatialPriorAttention, fit_mask
from .checks import is_int
from .priors import ConstantSpatialPrior, SpatialPrior


def check_grid(grid):
    """Raise a UserError unless ``grid`` is two positive integers (H, W)."""
    if not (
        isinstance(grid, (tuple, list))
        and len(grid) == 2
        and all(is_int(side) and side > 0 for side in grid)
    ):
        raise UserError(
            '`grid` must be two positive integers, the rows and columns of '
            f'patches, got {grid!r}.'
        )


def fold_priors(model, grid):
    """Replace every prior of a model by its values on one grid, in place.

    A prior that several layers share becomes one table that they share. Masks of
    attentions become those of the grid.

    Args:
        model (nn.Module): The model.
        grid (Tuple[int, int]): The grid (H, W).
    """
    device = next(model.parameters()).device
    constants = {}
    for parent in list(model.modules()):
        for name, prior in parent.named_children():
            if not isinstance(prior, SpatialPrior):
                continue
            if prior not in constants:
                constants[prior] = ConstantSpatialPrior.from_prior(prior, grid, device)
            setattr(parent, name, constants[prior])
        if isinstance(parent, SpatialPriorAttention) and parent.kept is not None:
            parent.set_kept(fit_mask(parent.kept, grid))


def check_folded(model, grid):
    """Raise a UserError unless a deployed model's tables are for ``grid``."""
    for prior in model.modules():
        if isinstance(prior, ConstantSpatialPrior) and prior.grid != tuple(grid):
            raise UserError(
                f'`grid` is {tuple(grid)}, but this model was switched to its '
                f'deploy form for {prior.grid}, and its priors are gone. Load '
                'the checkpoint of the training and switch that.'
            )
