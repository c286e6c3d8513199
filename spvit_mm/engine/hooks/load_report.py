from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

from mmengine.hooks import Hook
from mmpretrain.registry import HOOKS

from ...utils import UserError, unwrap_model

SHOWN = 10


@contextmanager
def reporting_loads(model, on_report: Callable[[int, str], None]):
    """Report what a load of a state dict into a model has done.

    torch hands three lists through a load: the missing and the unexpected names, and
    the errors. A hook before the load of the outermost module sees them while they
    are empty, and one behind it when all modules have had their say.

    Args:
        model (nn.Module): The model, no wrapper.
        on_report (callable): Called after each load inside. Takes how many parameters
            and buffers received a value, and what does not fit in words, which are
            empty where the checkpoint fits in every name and shape.
    """
    lists = []

    def before(state_dict, prefix, metadata, strict, missing, unexpected, errors):
        lists[:] = missing, unexpected, errors

    def after(module, incompatible_keys):
        missing, unexpected, errors = lists
        # Batch norm makes up its counter where an old checkpoint has none.
        missing, names = (
            [name for name in names if not name.endswith('num_batches_tracked')]
            for names in (missing, model.state_dict())
        )
        loaded = len(names) - len(missing) - len(errors)
        words = ''
        for what, which in (
            ('missing in it', missing),
            ('that do not fit', [error.strip(' .') for error in errors]),
            ('unknown to the model', unexpected),
        ):
            if which:
                shown = [*which[:SHOWN], *['...'] * (len(which) > SHOWN)]
                words += f'; {len(which)} {what}: {", ".join(shown)}'
        if words:
            words = (
                f'{loaded} of the {len(names)} parameters and buffers of the model were '
                f'loaded from the checkpoint{words}.'
            )
        on_report(loaded, words)

    first = model._register_load_state_dict_pre_hook(before)
    last = model.register_load_state_dict_post_hook(after)
    try:
        yield
    finally:
        first.remove()
        last.remove()


@HOOKS.register_module()
class LoadReportHook(Hook):
    """Say clearly what a checkpoint did to the model, and stop where it cannot fit.

    A checkpoint that fits in every name and shape passes silently. Of any other, the
    numbers of loaded, missing, differently shaped and unknown entries are stated,
    with the first ten names of each. A checkpoint of which nothing was loaded is an
    error, and so is one that fits partly where training is to be resumed from it, or
    that holds no state of a training. One without the optimizer's state is resumed with
    a warning.

    Args:
        partial (str): What to do about a checkpoint that fits partly, where it is
            loaded and not resumed: ``'warn'`` (fine-tuning with a new head), or
            ``'error'`` (testing). Defaults to 'warn'.

    Raises:
        UserError: See above; raised before any step of training or testing.
    """

    priority = 'VERY_HIGH'

    def __init__(self, partial: str = 'warn') -> None:
        if partial not in ('warn', 'error'):
            raise ValueError(f"partial must be 'warn' or 'error', got {partial!r}")
        self.partial = partial
        self._watch = ExitStack()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        # It has been read from the file, and goes into the model next.
        if runner._resume:
            self._check_resumable(runner, checkpoint)
        model = unwrap_model(runner.model)
        judge = partial(self._judge, runner)
        self._watch.enter_context(reporting_loads(model, judge))

    def _check_resumable(self, runner, checkpoint: dict) -> None:
        meta = checkpoint.get('meta') or {}
        if not {'epoch', 'iter'} <= set(meta) or 'message_hub' not in checkpoint:
            raise UserError(
                'Training cannot be resumed from this checkpoint: it holds weights, but '
                'not the state of a training (meta with epoch and iter, message_hub), '
                'as one that was published. To start a new training from its weights, '
                'set load_from and leave out --resume.'
            )
        if 'optimizer' not in checkpoint:
            runner.logger.warning(
                'The checkpoint holds no state of the optimizer, as the best_*.pth and '
                f'all with save_optimizer=False: training goes on after epoch '
                f'{meta["epoch"]}, iteration {meta["iter"]}, with an optimizer that '
                'starts anew (momentum and second moments at 0), and will not end with '
                'the weights of an uninterrupted run. The checkpoint that '
                'last_checkpoint names has it.'
            )

    def _judge(self, runner, loaded: int, words: str) -> None:
        if not words:
            return
        if not loaded:
            raise UserError(
                f'The checkpoint is not one of this model. {words} '
                'Give a checkpoint that was trained with this config, or the config '
                'that it was trained with.'
            )
        if runner._resume:
            raise UserError(
                f'Training cannot be resumed from a checkpoint of another model. '
                f'{words} To start a new training from its weights, set load_from '
                'and leave out --resume.'
            )
        if self.partial == 'error':
            raise UserError(
                f'The checkpoint fits this model only in part. {words} '
                'To use it all the same, pass --allow-partial.'
            )
        runner.logger.warning(
            f'The checkpoint fits this model only in part. {words} What was not '
            'loaded keeps its initial values.'
        )

    def before_train(self, runner) -> None:
        self._watch.close()

    before_val = before_test = before_train
