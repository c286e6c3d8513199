"""Testing by command line: what lies between its options and ``runner.test()``."""

import argparse
import inspect
import os.path as osp
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.engine import VisualizationHook

from ..engine.hooks import DataCheckHook, FiniteHook, LoadReportHook
from ..utils import UserError, check_new_file, check_new_folder
from .config_checks import check_config
from .configs import check_checkpoint, scope_of
from .runner import (
    DumpsBesideLog,
    add_hook,
    build_loop,
    build_runner,
    hook_class,
    merge_common_args,
    set_dataloader_defaults,
    show_progress,
)

# What testing reads of a config.
ENTRIES = (
    *('model', 'data_preprocessor', 'test_cfg', 'test_dataloader', 'test_evaluator'),
    *('default_hooks', 'custom_hooks'),
)
# What metrics are written to, beside a pickle.
METRICS = ('.json', '.yaml', '.yml')


def merge_test_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Apply the parsed options of testing to a config, in place.

    Raises:
        UserError: For options that do not fit the config or each other.
    """
    needed = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    merge_common_args(cfg, args, needed)
    init_default_scope(scope_of(cfg))
    check_config(cfg, *ENTRIES)
    check_checkpoint(args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.out_item is not None and args.out is None:
        raise UserError('--out-item says what --out receives: give --out too.')
    segmentation = scope_of(cfg) == 'mmseg'
    metrics = args.out_item == 'metrics'
    if args.out and segmentation and not metrics and not osp.splitext(args.out)[1]:
        if not isinstance(cfg.test_evaluator, dict):
            raise UserError('--out with a folder needs a single test_evaluator.')
        folder = check_new_folder(args.out)
        cfg.test_evaluator.update(output_dir=folder, keep_results=True)
        args.out = None
    elif args.out is not None:
        suffixes = (*(METRICS if metrics else ()), '.pkl', '.pickle')
        args.out = check_new_file(args.out, suffixes, force=True)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show_dir is not None:
        args.show_dir = check_new_folder(args.show_dir)
    if args.show or args.show_dir is not None:
        if args.tta and not segmentation:
            # mmpretrain's hook draws on the input, here a list of images.
            raise UserError(
                '--show and --show-dir cannot be combined with --tta: test twice, '
                'once with each.'
            )
        _set_visualization(cfg, args)
    if args.tta:
        _set_tta(cfg)
    set_dataloader_defaults(cfg, args, ('test_dataloader',))
    add_hook(cfg, LoadReportHook, partial='warn' if args.allow_partial else 'error')
    add_hook(cfg, FiniteHook)
    add_hook(cfg, DataCheckHook)
    return cfg


def _set_visualization(cfg: Config, args) -> None:
    """Switch on the visualization hook, mmsegmentation's or ours for mmpretrain's."""
    if args.interval < 1:
        raise UserError(f'--interval must be 1 or more, got {args.interval}.')
    if args.show and not has_windows():
        raise UserError(
            '--show opens windows, and there is no display to open one on (or no '
            'library to do it). Write the pictures into a folder: --show-dir FOLDER.'
        )
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show and --show-dir need a visualization hook in the config: '
            "default_hooks=dict(visualization=dict(type='VisualizationHook')), or "
            "'SegVisualizationHook' for segmentation."
        )
    kind = hook_class(cfg, hook)
    if kind is None:
        raise UserError(f'The visualization hook {hook.type} is not registered.')
    if kind is VisualizationHook:
        hook.type = 'mmpretrain.ClsVisualizationHook'
    known = inspect.signature(kind).parameters
    hook['enable' if 'enable' in known else 'draw'] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    hook.interval = args.interval
    if args.show_dir is None:
        return
    if 'out_dir' in known:
        hook.out_dir = args.show_dir
    elif isinstance(cfg.get('visualizer'), dict):
        cfg.visualizer.save_dir = args.show_dir
    else:
        raise UserError(
            '--show-dir needs `visualizer` in the config, such as '
            "dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])."
        )


def has_windows() -> bool:
    """Whether matplotlib can show a picture, and not only write one."""
    import matplotlib.pyplot as plt

    figure = plt.figure()
    plt.close(figure)
    return figure.canvas.required_interactive_framework is not None


def _mirrors(cfg) -> bool:
    """Whether a step in a part of a config mirrors images."""
    if isinstance(cfg, dict):
        kind = cfg.get('type', '')
        name = kind if isinstance(kind, str) else kind.__name__
        return name.endswith('RandomFlip') or _mirrors(list(cfg.values()))
    return isinstance(cfg, (list, tuple)) and any(map(_mirrors, cfg))


def _set_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation and set its pipeline."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        if scope_of(cfg) != 'mmpretrain':
            raise UserError('--tta needs tta_model and tta_pipeline in the config.')
        training = cfg.get('train_dataloader')
        if training is not None and not _mirrors(training):
            raise UserError(
                '--tta takes the mean over an image and its mirror image, and the '
                'training of this config shows no mirror images (those of digits and '
                'letters mean something else). Set tta_pipeline in the config.'
            )
        *load, pack = cfg.test_dataloader.dataset.pipeline
        flips = [{'type': 'RandomFlip', 'prob': p} for p in (1.0, 0.0)]
        cfg.setdefault('tta_model', {'type': 'AverageClsScoreTTA'})
        cfg.setdefault(
            'tta_pipeline',
            [*load, {'type': 'TestTimeAug', 'transforms': [flips, [pack]]}],
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = deepcopy(cfg.tta_pipeline)


def build_tester(cfg: Config, args: argparse.Namespace) -> Runner:
    """Build the runner of a config and what it tests with.

    Args:
        cfg (Config): The config, the options applied to it.
        args (argparse.Namespace): The parsed options.

    Returns:
        Runner: The runner, ready for ``test()``.

    Raises:
        UserError: For a mistake in the config.
    """
    runner = build_runner(cfg, DumpsBesideLog)
    loop = build_loop(runner, 'test', 'test')
    show_progress(runner, loop)
    if args.out is not None and args.out_item != 'metrics':
        loop.evaluator.metrics.append(DumpResults(out_file_path=args.out))
    return runner
