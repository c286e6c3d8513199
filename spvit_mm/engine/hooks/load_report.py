from dataclasses import dataclass, field

import torch
from mmengine.hooks import Hook
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from mmpretrain.registry import HOOKS

from ...utils import UserError, unwrap_model

SHOWN = 10


def _listed(names: list[str]) -> str:
    more = f' ... and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


@dataclass
class LoadReport:
    """What of a checkpoint reached a model.

    Attributes:
        total (int): Parameters and buffers of the model, counters of batch norm aside.
        loaded (list[str]): Those that received a value.
        missing (list[str]): Those that the checkpoint does not have.
        mismatched (list[tuple]): (name, shape in the checkpoint, shape in the model)
            of those that have another shape in the checkpoint.
        unexpected (list[str]): Names in the checkpoint that the model does not have.
    """

    total: int
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the checkpoint fits the model in every name and shape."""
        return not (self.missing or self.mismatched or self.unexpected)

    def __str__(self) -> str:
        text = [
            f'{len(self.loaded)} of the {self.total} parameters and buffers of the '
            'model were loaded from the checkpoint.'
        ]
        if self.missing:
            text.append(
                f'{len(self.missing)} are missing in it: {_listed(self.missing)}.'
            )
        if self.mismatched:
            shapes = [
                f'{name} {there} there and {here} in the model'
                for name, there, here in self.mismatched
            ]
            text.append(f'{len(shapes)} have another shape: {_listed(shapes)}.')
        if self.unexpected:
            text.append(
                f'{len(self.unexpected)} of its entries are unknown to the model: '
                f'{_listed(self.unexpected)}.'
            )
        return ' '.join(text)


class _Watch:
    """Sees what the next load of a state dict into a model does.

    A tensor that is written counts up its version, so what was loaded is seen on the
    tensors themselves, whatever names and shapes the model's own state-dict hooks
    make of a checkpoint on the way.
    """

    def __init__(self, model, state_dict: dict, on_report) -> None:
        self.state_dict = state_dict
        self.on_report = on_report
        self.tensors = {
            name: value
            for name, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, torch.Tensor)
            # Batch norm makes up its counter where an old checkpoint has none.
            and not name.endswith('num_batches_tracked')
        }
        self.versions = {name: t._version for name, t in self.tensors.items()}
        self.handle = model.register_load_state_dict_post_hook(self)

    def __call__(self, module, incompatible_keys) -> None:
        if self.on_report is None:
            return
        on_report, self.on_report = self.on_report, None
        report = LoadReport(len(self.tensors))
        absent = set(incompatible_keys.missing_keys)
        for name, tensor in self.tensors.items():
            if tensor._version != self.versions[name]:
                report.loaded.append(name)
            elif name not in absent and name in self.state_dict:
                report.mismatched.append(
                    (name, tuple(self.state_dict[name].shape), tuple(tensor.shape))
                )
            else:
                report.missing.append(name)
        report.unexpected = list(incompatible_keys.unexpected_keys)
        on_report(report)


def load_whole_checkpoint(model, path: str) -> dict:
    """Load a checkpoint that must fit a model in every name and shape.

    For tools that look into a model without a runner.

    Args:
        model (nn.Module): The model, filled in place.
        path (str): Path or address of the checkpoint.

    Returns:
        dict: The checkpoint.

    Raises:
        UserError: If it fits only in part, or not at all; with the report.
    """
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    state_dict = checkpoint.get('state_dict', checkpoint)
    state_dict = {name.removeprefix('module.'): v for name, v in state_dict.items()}
    reports = []
    watch = _Watch(model, state_dict, reports.append)
    load_state_dict(model, state_dict, strict=False, logger='silent')
    watch.handle.remove()
    if not reports[0].complete:
        raise UserError(f'{path} is not a checkpoint of this model. {reports[0]}')
    return checkpoint


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
        self._watch = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self._stop()
        state_dict = checkpoint.get('state_dict', checkpoint)
        self._watch = _Watch(
            unwrap_model(runner.model),
            {name.removeprefix('module.'): v for name, v in state_dict.items()},
            lambda report: self._judge(runner, report),
        )

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

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.handle.remove()
            self._watch = None

    def before_train(self, runner) -> None:
        self._stop()

    def before_val(self, runner) -> None:
        self._stop()

    def before_test(self, runner) -> None:
        self._stop()
