"""Testing by command line, with the options of mmpretrain's ``tools/test.py``."""

import argparse
import inspect
import os.path as osp
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, init_default_scope
from mmpretrain.engine import VisualizationHook

from ..engine.data_checks import building_data
from ..utils import UserError
from .cli import add_common_arguments
from .configs import (
    add_hook,
    apply_common,
    build_runner,
    check_checkpoint,
    scope_of,
    set_dataloader_defaults,
    show_progress,
)


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of testing."""
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='path or address of the checkpoint')
    parser.add_argument(
        '--out',
        help='file for the results: .pkl for predictions; .json, .yaml or .pkl for '
        'metrics. With a segmentation config a folder, for the label maps',
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help='what --out receives (default: pred)',
    )
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument(
        '--show', action='store_true', help='show the predictions in a window'
    )
    parser.add_argument(
        '--interval', type=int, default=1, help='draw every n-th prediction'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that a window stays'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_pipeline and tta_model of the config or, for '
        'classification, the mean over an image and its mirror image',
    )
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='test a checkpoint that fits the model only in part',
    )


def _set_visualization(cfg: Config, args) -> None:
    """Switch on the visualization hook, mmsegmentation's or ours for mmpretrain's."""
    if args.interval < 1:
        raise UserError(f'--interval must be 1 or more, got {args.interval}.')
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show and --show-dir need a visualization hook in the config: '
            "default_hooks=dict(visualization=dict(type='VisualizationHook')), or "
            "'SegVisualizationHook' for segmentation."
        )
    hook_class = hook.type
    if isinstance(hook_class, str):
        with HOOKS.switch_scope_and_registry(scope_of(cfg)) as registry:
            hook_class = registry.get(hook_class)
    if hook_class is None:
        raise UserError(f'The visualization hook {hook.type} is not registered.')
    if hook_class is VisualizationHook:
        hook.type = 'mmpretrain.ClsVisualizationHook'
    known = inspect.signature(hook_class).parameters
    hook['enable' if 'enable' in known else 'draw'] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    hook.interval = args.interval
    if args.show_dir is None:
        return
    if 'out_dir' in known:
        hook.out_dir = args.show_dir
    else:
        cfg.visualizer.save_dir = args.show_dir


def _set_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation and set its pipeline."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        if scope_of(cfg) != 'mmpretrain':
            raise UserError('--tta needs tta_model and tta_pipeline in the config.')
        *load, pack = cfg.test_dataloader.dataset.pipeline
        flips = [{'type': 'RandomFlip', 'prob': p} for p in (1.0, 0.0)]
        cfg.setdefault('tta_model', {'type': 'AverageClsScoreTTA'})
        cfg.setdefault(
            'tta_pipeline',
            [*load, {'type': 'TestTimeAug', 'transforms': [flips, [pack]]}],
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = deepcopy(cfg.tta_pipeline)


def apply_test_options(cfg: Config, args) -> Config:
    """Apply the parsed options of testing to a config, in place.

    Raises:
        UserError: For options that do not fit the config or each other.
    """
    needed = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    apply_common(cfg, args, needed)
    init_default_scope(scope_of(cfg))
    check_checkpoint(args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.out_item is not None and args.out is None:
        raise UserError('--out-item says what --out receives: give --out too.')
    suffix = osp.splitext(args.out or '')[1]
    segmentation = scope_of(cfg) == 'mmseg'
    if args.out is not None and args.out_item == 'metrics':
        if suffix not in ('.json', '.yaml', '.yml', '.pkl', '.pickle'):
            raise UserError(f'--out must end in .json, .yaml or .pkl, got {args.out}.')
    elif args.out is not None and suffix not in ('.pkl', '.pickle'):
        if not segmentation or suffix:
            raise UserError(f'--out must end in .pkl, got {args.out}.')
        if not isinstance(cfg.test_evaluator, dict):
            raise UserError('--out with a folder needs a single test_evaluator.')
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
        args.out = None
    if args.out is not None and osp.isdir(args.out):
        raise UserError(f'--out must be a file, and {args.out} is a folder.')
    if args.amp:
        cfg.test_cfg.fp16 = True
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
    add_hook(cfg, 'LoadReportHook', partial='warn' if args.allow_partial else 'error')
    add_hook(cfg, 'DataCheckHook')
    return cfg


def run_test(cfg: Config, metrics: tuple = ()) -> dict:
    """Test what a config describes, its data set checked first.

    Args:
        cfg (Config): The config, its ``load_from`` the checkpoint.
        metrics (tuple): Metrics to put beside those of the config.

    Returns:
        dict: The values of the metrics.
    """
    runner = build_runner(cfg)
    with building_data(cfg.test_dataloader, 'test'):
        loop = runner.test_loop
    show_progress(runner, loop.dataloader)
    loop.evaluator.metrics.extend(metrics)
    return runner.test()
