from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from mmengine.hooks import Hook
from mmpretrain.registry import HOOKS

from ...utils import UserError, unwrap_model

SHOWN = 10


@dataclass
class LoadReport:
    """What of a checkpoint reached a model.

    Attributes:
        total (int): Parameters and buffers of the model, counters of batch norm aside.
        missing (list[str]): Those that the checkpoint does not have.
        errors (list[str]): What torch says of each that could not be copied, such as
            one of another shape.
        unexpected (list[str]): Names in the checkpoint that the model does not have.
    """

    total: int
    missing: list[str]
    errors: list[str]
    unexpected: list[str]

    @property
    def loaded(self) -> int:
        """How many of ``total`` received a value."""
        return self.total - len(self.missing) - len(self.errors)

    @property
    def complete(self) -> bool:
        """Whether the checkpoint fits the model in every name and shape."""
        return not (self.missing or self.errors or self.unexpected)

    def __str__(self) -> str:
        text = [
            f'{self.loaded} of the {self.total} parameters and buffers of the model were '
            'loaded from the checkpoint'
        ]
        for what, names in (
            ('missing in it', self.missing),
            ('that do not fit', self.errors),
            ('unknown to the model', self.unexpected),
        ):
            if names:
                shown = [*names[:SHOWN], *['...'] * (len(names) > SHOWN)]
                text.append(f'{len(names)} {what}: {", ".join(shown)}')
        return '; '.join(text) + '.'


@contextmanager
def reporting_loads(model, on_report: Callable[[LoadReport], None]):
    """Report what a load of a state dict into a model has done.

    torch hands three lists through a load: the missing and the unexpected names, and
    the errors. A hook before the load of the outermost module sees them while they
    are empty, and one behind it when all modules have had their say.

    Args:
        model (nn.Module): The model, no wrapper.
        on_report (callable): Takes the :class:`LoadReport` of each load inside.
    """
    lists = []

    def before(state_dict, prefix, metadata, strict, missing, unexpected, errors):
        lists[:] = missing, unexpected, errors

    def after(module, incompatible_keys):
        missing, unexpected, errors = lists
        on_report(
            LoadReport(
                total=len(_tensors(model.state_dict())),
                missing=_tensors(missing),
                errors=[error.strip(' .') for error in errors],
                unexpected=list(unexpected),
            )
        )

    first = model._register_load_state_dict_pre_hook(before)
    last = model.register_load_state_dict_post_hook(after)
    try:
        yield
    finally:
        first.remove()
        last.remove()


def _tensors(names) -> list[str]:
    # Batch norm makes up its counter where an old checkpoint has none.
    return [name for name in names if not name.endswith('num_batches_tracked')]


@HOOKS.register_module()
class LoadReportHook(Hook):
    """Say clearly what a checkpoint did to the model, and stop where it cannot fit.

    A checkpoint that fits in every name and shape passes silently. Of any other, the
    numbers of loaded, missing, differently shaped and unknown entries are stated,
    with the first ten names of each. A checkpoint of which nothing was loaded is an
    error, and so is one that fits partly where training is to be resumed from it.

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
        model = unwrap_model(runner.model)
        judge = partial(self._judge, runner)
        self._watch.enter_context(reporting_loads(model, judge))

    def _judge(self, runner, report: LoadReport) -> None:
        if report.complete:
            return
        if not report.loaded:
            raise UserError(
                f'The checkpoint is not one of this model. {report} '
                'Give a checkpoint that was trained with this config, or the config '
                'that it was trained with.'
            )
        if runner._resume:
            raise UserError(
                f'Training cannot be resumed from a checkpoint of another model. '
                f'{report} To start a new training from its weights, set load_from '
                'and leave out --resume.'
            )
        if self.partial == 'error':
            raise UserError(
                f'The checkpoint fits this model only in part. {report} '
                'To use it all the same, pass --allow-partial.'
            )
        runner.logger.warning(
            f'The checkpoint fits this model only in part. {report} What was not '
            'loaded keeps its initial values.'
        )

    def before_train(self, runner) -> None:
        self._watch.close()

    def before_val(self, runner) -> None:
        self._watch.close()

    def before_test(self, runner) -> None:
        self._watch.close()
