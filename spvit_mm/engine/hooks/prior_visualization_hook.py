from typing import Optional

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmpretrain.registry import HOOKS

from ...explain import collect_priors, draw_priors, head_focus, why_no_priors
from ...utils import figure_to_image, unwrap_model


@HOOKS.register_module()
class PriorVisualizationHook(Hook):
    """Log the learned spatial priors and their statistics while training.

    The maps of all layers and heads go to every backend of the visualizer
    (files, TensorBoard, WandB, ..) as one image ``priors``, and each head's
    focus as the scalars ``prior/layer1_head1/radius`` (effective radius in
    patches), ``.../locality``, ``.../right``, ``.../down`` and, where a layer
    has several, ``.../difference`` (see :class:`spvit_mm.explain.HeadFocus`). Where a
    layer multiplies by one prior and adds another, the names begin with
    ``prior/layer1_multiplied_head1`` and ``prior/layer1_added_head1``.
    The step is the epoch, or the iteration with ``by_epoch=False``; 0 is the
    start of training. A model without priors, such as the baseline of the same
    config, trains all the same: one line of the log says that there is nothing to
    show.

    Args:
        interval (int): Log every n epochs or iterations. Defaults to 1.
        by_epoch (bool): Whether to count epochs. Defaults to True.
        images (bool): Whether to log the maps. Defaults to True.
        scalars (bool): Whether to log the statistics. Defaults to True.
        grid (Tuple[int, int], optional): The grid (H, W) to show. Defaults to
            None: that of the priors' training.

    Raises:
        ValueError: If ``interval`` is no positive integer; before training, if
            ``grid`` is needed.
    """

    priority = 'LOW'

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        images: bool = True,
        scalars: bool = True,
        grid: Optional[tuple] = None,
    ):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f'`interval` must be a positive integer, got {interval!r}.'
            )
        self.interval = interval
        self.by_epoch = by_epoch
        self.images = images
        self.scalars = scalars
        self.grid = grid
        self.active = True

    def before_train(self, runner) -> None:
        """Log the start, which also tells at once if there is nothing to log."""
        missing = why_no_priors(unwrap_model(runner.model))
        self.active = missing is None
        if self.active:
            self.log(runner, runner.epoch if self.by_epoch else runner.iter)
        else:
            runner.logger.warning(f'PriorVisualizationHook logs nothing: {missing}')

    def after_train_epoch(self, runner) -> None:
        if not self.active:
            return
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval)
            or self.is_last_train_epoch(runner)
        ):
            self.log(runner, runner.epoch + 1)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.active:
            return
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval)
            or self.is_last_train_iter(runner)
        ):
            self.log(runner, runner.iter + 1)

    @master_only
    def log(self, runner, step: int) -> None:
        maps = collect_priors(unwrap_model(runner.model), self.grid)
        if self.images:
            unit = 'epochs' if self.by_epoch else 'iterations'
            figure = draw_priors(maps, f'after {step} {unit}')
            runner.visualizer.add_image('priors', figure_to_image(figure), step)
        if self.scalars:
            runner.visualizer.add_scalars(self.statistics(maps), step)

    def statistics(self, maps) -> dict:
        """The scalars of all heads."""
        values = {}
        for focus in head_focus(maps):
            layer = focus.layer.replace(', ', '_').replace(' ', '')
            name = f'prior/{layer}_head{focus.head}'
            for key in ('radius', 'locality', 'right', 'down', 'difference'):
                value = getattr(focus, key)
                if value == value:  # nan: the layer's only prior
                    values[f'{name}/{key}'] = value
        return values
