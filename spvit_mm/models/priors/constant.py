"""The deploy form of a prior: its values on one grid."""

import torch
from mmengine.model import BaseModule

from ...utils import CheckpointError, UserError
from .base import SpatialPrior


class ConstantSpatialPrior(SpatialPrior):
    """The deploy form of any prior: its values on one grid, and no parameters.

    Made by :meth:`from_prior`; :meth:`SPViT.switch_to_deploy` puts it in the place
    of every prior. A checkpoint brings its own grid with it.

    Args:
        num_heads (int): Number of priors.
        grid (Tuple[int, int]): The grid (H, W), the only one that it serves.
    """

    def __init__(self, num_heads, grid):
        super().__init__(num_heads, grid=grid)
        height, width = self.grid
        shape = (num_heads, 2 * height - 1, 2 * width - 1)
        self.register_buffer('omega', torch.ones(shape))
        self.register_buffer('kept', None)

    @classmethod
    @torch.no_grad()
    def from_prior(cls, prior, grid, device=None):
        """Evaluate a :class:`SpatialPrior` on a grid (H, W).

        Args:
            prior (SpatialPrior): The prior; it stays as it is.
            grid (Tuple[int, int]): The grid (H, W).
            device (torch.device, optional): Where to put the values of a prior
                without parameters.
        """
        # A buffer born in inference mode could not enter a later training.
        with torch.inference_mode(False):
            new = cls(prior.num_heads, grid)
            new.omega = prior(new.grid, device).detach().clone()
            kept = prior.keep(new.grid, device)
            new.kept = None if kept is None else kept.clone()
        return new.train(prior.training)

    def forward(self, hw, device=None, rescale=None):
        """The table (num_heads, 2H-1, 2W-1) of the one grid.

        Raises:
            UserError: For another grid.
        """
        hw = (int(hw[0]), int(hw[1]))
        if hw != self.grid:
            raise UserError(
                f'The image makes a grid of {hw[0]} x {hw[1]} patches, but this model '
                f'was deployed for {self.grid[0]} x {self.grid[1]}, for which the '
                "priors' values are fixed. Resize the image to that grid, or deploy "
                f'the trained model again for this one: '
                f'`switch_to_deploy(grid=({hw[0]}, {hw[1]}))`, or '
                f'tools/model_converters/reparameterize_model.py with '
                f'`--grid {hw[0]} {hw[1]}`.'
            )
        omega = self.omega
        return omega if omega.dtype == torch.float64 else omega.float()

    def keep(self, hw, device=None):
        return self.kept

    def _load_from_state_dict(self, state_dict, prefix, *args):
        value = state_dict.get(prefix + 'omega')
        if value is None:
            if any(key.startswith(prefix) for key in state_dict):
                raise CheckpointError(
                    f'The checkpoint holds the parameters of the prior '
                    f'{prefix.rstrip(".")!r}, but this model is in deploy form, which '
                    'holds its values on one grid. Convert the checkpoint with '
                    'tools/model_converters/reparameterize_model.py, or build the '
                    'model with deploy=False.'
                )
        elif value.dim() == 3 and value.shape[0] == self.num_heads:
            self.grid = ((value.shape[1] + 1) // 2, (value.shape[2] + 1) // 2)
            with torch.no_grad():
                self.omega.resize_(value.shape)
                if self.kept is not None:
                    self.kept.resize_(value.shape)
        # The base class takes a table for a mistake.
        BaseModule._load_from_state_dict(self, state_dict, prefix, *args)

    def extra_repr(self):
        return f'num_heads={self.num_heads}, grid={self.grid}'
