"""What is wrong with a config, told before its data is read or its model built.

Mistakes that would stay silent, be noticed after hours, or be blamed on something else.
What mmengine and the parts themselves say clearly and in time is left to them.
"""

import inspect
import math
from collections.abc import Iterator
from difflib import get_close_matches

from mmengine import registry
from mmengine.config import Config
from mmengine.runner import Runner

from ..models.checks import is_int
from ..utils import UserError
from .configs import scope_of

# What mmengine's runners and mmpretrain's and mmseg's tools read beside the arguments
# of Runner.
RUNNER_KEYS = (
    *list(inspect.signature(Runner.__init__).parameters)[1:-1],
    *('runner_type', 'strategy', 'compile', 'model_wrapper_cfg', 'sync_bn'),
    *('find_unused_parameters', 'activation_checkpointing', 'efficient_conv_bn_eval'),
    *('custom_imports', 'tta_model', 'tta_pipeline'),
)
# Names that configs give to what they put into other entries.
HELPER_KEYS = (
    *('train_pipeline', 'val_pipeline', 'test_pipeline', 'vis_backends', 'dataset'),
    *('train_dataset', 'val_dataset', 'test_dataset', 'dataset_type', 'data_root'),
    *('train_loader', 'val_loader', 'test_loader', 'optimizer', 'models'),
    *('model_cfg', 'bgr_mean', 'bgr_std', 'norm_cfg'),
)
# Entries that must be whole numbers, and the smallest that does something.
SMALLEST = {
    'train_cfg.max_epochs': 1,
    'train_cfg.max_iters': 1,
    'train_cfg.val_interval': 1,
    'train_cfg.val_begin': 0,
    'default_hooks.checkpoint.interval': -1,
    'default_hooks.logger.interval': 1,
}
# What parts are called that are built only once the data is there.
REGISTRIES = {
    'dataset': registry.DATASETS,
    'datasets': registry.DATASETS,
    'pipeline': registry.TRANSFORMS,
    'transforms': registry.TRANSFORMS,
    'sampler': registry.DATA_SAMPLERS,
    'batch_sampler': registry.DATA_SAMPLERS,
    'optim_wrapper': registry.OPTIM_WRAPPERS,
    'optimizer': registry.OPTIMIZERS,
    'param_scheduler': registry.PARAM_SCHEDULERS,
    'val_evaluator': registry.METRICS,
    'test_evaluator': registry.METRICS,
}
BUILT_FIRST = ('model', 'data_preprocessor', 'default_hooks', 'custom_hooks')
# Texts that are true wherever True or False is asked for.
BOOLEAN_WORDS = ('yes', 'no', 'on', 'off', 'true', 'false')


def check_config(cfg: Config, *entries: str) -> None:
    """Raise a UserError for the first mistake in a config.

    Args:
        cfg (Config): The config, with the options of the command applied.
        *entries (str): The entries that the command uses, such as
            'train_dataloader' and 'optim_wrapper'.
    """
    _check_keys(cfg)
    used = {name: cfg[name] for name in entries if cfg.get(name) is not None}
    for path, key, value in _walk(used):
        _check_value(path, key, value)
    for path, smallest in SMALLEST.items():
        if path.partition('.')[0] in used:
            _check_number(cfg, path, smallest)
    # The other parts are built before the data, and so blamed for themselves.
    late = {name: used[name] for name in used if name not in BUILT_FIRST}
    foreign = ()
    for path, key, value in _walk(late):
        # Its transforms are albumentations' own.
        if isinstance(value, dict) and 'Albu' in str(value.get('type')):
            foreign += (f'{path}.',)
        if key in REGISTRIES and not path.startswith(foreign):
            _check_names(path, value, REGISTRIES[key], scope_of(cfg))
    if 'model' in used:
        _check_classes(cfg, used)


def _walk(value, path: str = '', key: str = '') -> Iterator[tuple]:
    """All entries, those of containers before what they hold: path, key, value."""
    if path:
        yield path, key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, f'{path}.{name}'.lstrip('.'), name)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _walk(item, f'{path}.{i}', i)


def _check_keys(cfg: Config) -> None:
    for key in cfg:
        if key in RUNNER_KEYS or key in HELPER_KEYS or key.startswith('_'):
            continue
        near = get_close_matches(key, RUNNER_KEYS, 1, 0.8)
        if near and not _is_derived(key, near[0]):
            raise UserError(
                f'The config has the entry `{key}`, which nothing reads. Is it '
                f'`{near[0]}`? A variable of your own needs a name less like that.'
            )


def _is_derived(key: str, known: str) -> bool:
    """Whether a name is made from another (`model_a`, `train_cfg2`) with intent."""
    if key not in known and known not in key:
        return False
    return abs(len(key) - len(known)) > 1 or key[-1:].isdigit()


def _check_value(path: str, key, value) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f'`{path}` is nan, which is no number to compute with.')
    named = isinstance(key, str) and key != 'type' and '.metainfo.' not in f'.{path}.'
    if named and isinstance(value, str) and value.lower() in BOOLEAN_WORDS:
        raise UserError(
            f'`{path}` is the text {value!r}, which counts as true wherever True or '
            'False is asked for. Write True or False, without quotes.'
        )
    if key == 'std' and isinstance(value, (list, tuple)) and 0 in value:
        raise UserError(
            f'`{path}` is {list(value)}: images are divided by it, so no value may be '
            '0. Give 1 to leave a channel as it is.'
        )


def _get(cfg: Config, path: str):
    value = cfg
    for name in path.split('.'):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_number(cfg: Config, path: str, smallest: int) -> None:
    value = _get(cfg._cfg_dict, path)
    if value is None:
        return
    whole = is_int(value) or (isinstance(value, float) and value.is_integer())
    if not whole or value < smallest:
        raise UserError(
            f'`{path}` must be a whole number of {smallest} or more, got {value!r}.'
        )


def _check_names(path: str, value, kind: registry.Registry, scope: str) -> None:
    """Raise an error for a part whose type is not registered."""
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_names(f'{path}.{i}', item, kind, scope)
        return
    name = value.get('type') if isinstance(value, dict) else None
    if not isinstance(name, str):
        return
    kinds = [kind, registry.EVALUATOR] if kind is registry.METRICS else [kind]
    known = []
    for each in kinds:
        with each.switch_scope_and_registry(value.get('_scope_', scope)) as found:
            if found.get(name) is not None:
                return
            while found is not None:
                known += found.module_dict
                found = found.parent
    near = get_close_matches(name, known, 1)
    raise UserError(
        f'`{path}.type` is {name!r}, which is no registered {kind.name}. '
        + (f'Is it {near[0]!r}? ' if near else '')
        + 'One of your own needs the module that registers it in custom_imports.'
    )


def _check_classes(cfg: Config, used: dict) -> None:
    """Raise an error for numbers that do not fit the classes of a classifier."""
    head = _get(used, 'model.head')
    if not isinstance(head, dict) or not is_int(head.get('num_classes')):
        return
    classes = head['num_classes']
    metrics = {'model.head': head} if head.get('cal_acc') else {}
    for name in used:
        if name.endswith('_evaluator'):
            metrics.update(
                {p: v for p, _, v in _walk({name: used[name]}) if isinstance(v, dict)}
            )
    for path, metric in metrics.items():
        kind = metric.get('type')
        if path != 'model.head' and kind not in ('Accuracy', 'mmpretrain.Accuracy'):
            continue
        topk = metric.get('topk', 1)
        topk = topk if isinstance(topk, (list, tuple)) else [topk]
        if any(not is_int(k) or not 1 <= k <= classes for k in topk):
            raise UserError(
                f'`{path}.topk` is {metric["topk"]!r}, and the head tells '
                f'num_classes={classes} classes apart: the accuracy of the k best '
                f'needs a k from 1 to {classes}.'
            )
    for path in ('data_preprocessor', 'model.data_preprocessor'):
        count = _get(cfg._cfg_dict, f'{path}.num_classes')
        augments = _get(cfg._cfg_dict, 'model.train_cfg.augments')
        if augments and is_int(count) and count != classes:
            raise UserError(
                f'`{path}.num_classes` is {count} and `model.head.num_classes` is '
                f'{classes}: the labels that model.train_cfg.augments mixes must be as '
                'long as the scores. Set both to the number of classes.'
            )
