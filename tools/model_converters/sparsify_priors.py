#!/usr/bin/env python
"""Mask in every head of a trained model the offsets that its attention does not need.

Each head keeps the fewest offsets that hold a share of its attention between patches, as
measured on training images; keys out of its reach are not computed.
Writes the checkpoint OUT.pth and its config OUT.py.
"""

import argparse
import os
import os.path as osp

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='sparsify_priors.py', description=__doc__)
    parser.add_argument('config', help='path of the config of the training')
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument(
        'out', help='the .pth or .safetensors to write; its config is OUT with .py'
    )
    parser.add_argument(
        '--keep-mass',
        type=number(0, 1, float, above=True),
        default=0.98,
        metavar='SHARE',
        help='share of the attention between patches that each head keeps, in (0, 1] '
        '(default: 0.98)',
    )
    parser.add_argument(
        '--by',
        choices=('fewest', 'window'),
        default='fewest',
        help='keep the fewest offsets that hold it, wherever they lie, or all of the '
        'smallest rectangle that does, which is what the CPU computes (default: fewest)',
    )
    parser.add_argument(
        '--data',
        nargs='+',
        metavar='PATH',
        help='pictures, or folders of them, to measure the attention on; they go through '
        'the test pipeline and must come out of one size (default: batches of the '
        'training data)',
    )
    parser.add_argument(
        '--mass-batches',
        type=number(1),
        default=4,
        metavar='N',
        help='batches of the training data to measure the attention on (default: 4)',
    )
    parser.add_argument(
        '--finetune',
        type=number(0),
        default=0,
        metavar='EPOCHS',
        help='train for these epochs with the masks, at a constant learning rate '
        '(default: 0)',
    )
    parser.add_argument(
        '--lr-factor',
        type=number(0, kind=float, above=True),
        default=0.1,
        help='learning rate of the fine-tuning over that of the config (default: 0.1)',
    )
    parser.add_argument(
        '--work-dir', help='of the fine-tuning (default: OUT without .pth)'
    )
    parser.add_argument(
        '--deploy',
        action='store_true',
        help='also fold the priors into constants, for the grid of the measurement',
    )
    parser.add_argument(
        '--no-test', action='store_true', help='do not evaluate on the test data'
    )
    parser.add_argument(
        '--force', action='store_true', help='replace the files that are there'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint])
    return args


def check_outputs(args) -> tuple[str, str]:
    """The names of the two files to write."""
    from spvit_mm.utils import check_new_file, check_not_source

    out = check_new_file(args.out, ('.pth', '.safetensors'), args.force)
    config = check_new_file(f'{osp.splitext(out)[0]}.py', ('.py',), args.force)
    check_not_source(out, args.checkpoint)
    check_not_source(config, args.config)
    if args.finetune:
        args.work_dir = check_work_dir(args.work_dir or osp.splitext(out)[0], args)
    return out, config


def check_work_dir(path: str, args) -> str:
    """The folder of the fine-tuning, which writes its config and its start there."""
    from spvit_mm.utils import UserError, check_new_folder, check_not_source

    path = check_new_folder(path)
    check_not_source(osp.join(path, osp.basename(args.config)), args.config)
    check_not_source(osp.join(path, 'start.pth'), args.checkpoint)
    if osp.isdir(path) and os.listdir(path) and not args.force:
        raise UserError(
            f'The folder of the fine-tuning, {path}, is not empty. Give another with '
            '--work-dir, or --force to write into it.'
        )
    return path


def check_config(cfg, args) -> None:
    """Name what the config lacks."""
    from spvit_mm.apis import check_entries
    from spvit_mm.apis.sparsify import finetune_config

    needed = {'test_dataloader': args.data, 'train_dataloader': not args.data}
    if args.finetune:
        needed.update(train_dataloader=True, optim_wrapper=True)
    check_entries(cfg, [name for name, used in needed.items() if used])
    if args.finetune:
        finetune_config(cfg, args.finetune, args.lr_factor)


def print_kept(kept: list, grid: tuple, args) -> None:
    """What each head keeps, one line per layer."""
    from spvit_mm.explain.binarize import mean_kept
    from spvit_mm.explain.recording import layer_name
    from spvit_mm.ops.attention import LOCAL_SHARE

    size = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    how = {
        'fewest': 'the fewest offsets that hold',
        'window': 'the smallest rectangle of offsets that holds',
    }[args.by]
    print(
        f'Grid of {grid[0]} x {grid[1]} patches, {size} offsets. Each head keeps {how} '
        f'{args.keep_mass:g} of its attention between patches.\n'
        f'{"":10}  by head: kept offsets (share of the pairs, of the attention)'
    )
    for layer in kept:
        rows = zip(layer.keep.flatten(1).sum(1), layer.pairs, layer.mass, strict=True)
        heads = '  '.join(f'{n:>4} ({p:.2f}, {m:.3f})' for n, p, m in rows)
        print(f'{layer_name(layer.name):10}  {heads}')
    offsets, pairs, mass = mean_kept(kept)
    near = sum(layer.computed <= LOCAL_SHARE for layer in kept)
    computed = sum(layer.computed for layer in kept) / len(kept)
    print(
        f'Kept on average: {offsets:.3f} of the offsets, {pairs:.3f} of the pairs, '
        f'{mass:.3f} of the attention.\n'
        f'Near keys alone would cost as much as {computed:.3f} of all pairs; on the CPU '
        f"attn_impl='auto' takes them in {near} of these {len(kept)} layers (up to "
        f'{LOCAL_SHARE} in a layer).',
        flush=True,
    )


def main(argv: list) -> None:
    import torch
    from mmengine.device import get_device

    from spvit_mm.apis import load_config, load_trained_model
    from spvit_mm.apis import sparsify as api
    from spvit_mm.explain import offset_mass, sparsify, why_no_priors
    from spvit_mm.utils import UserError, whole_file, write_checkpoint

    args = parse_args(argv)
    out, config_out = check_outputs(args)
    cfg = load_config(args.config, args.cfg_options)
    check_config(cfg, args)
    model, checkpoint = load_trained_model(cfg, args.checkpoint)
    missing = why_no_priors(model)
    if missing:
        raise UserError(missing)
    model.to(get_device())
    masked_cfg = api.masked_config(cfg)
    masked = api.build_masked(masked_cfg, model)
    test = None if args.no_test else api.evaluation_data(cfg)
    if args.data:
        images = api.picture_images(cfg, model, args.data)
    else:
        images = api.training_images(cfg, model, args.mass_batches)
    shapes = []

    def seen(batches):
        for batch in batches:
            shapes.append(batch.shape)
            yield batch

    masses, grid = offset_mass(masked, seen(images))
    kept = sparsify(masked, masses, args.keep_mass, args.by)
    print_kept(kept, grid, args)

    if test:
        name, before = api.evaluate(model, *test)
        _, after = api.evaluate(masked, *test)
        print(f'{name}: {before:.2f} before, {after:.2f} after', flush=True)
    if args.finetune:
        masked = api.finetune(
            masked_cfg, masked, args.finetune, args.lr_factor, args.work_dir
        )
        if test:
            _, after = api.evaluate(masked, *test)
            print(f'{name}: {after:.2f} after fine-tuning, epochs: {args.finetune}')
    if args.deploy:
        masked.backbone.switch_to_deploy(grid)
        masked_cfg.model.backbone.deploy = True
    _, *shape = shapes[0]
    example = torch.randn(1, *shape, device=next(model.parameters()).device)
    old, new = api.time_forwards([model, masked], example)
    print(
        f'Forward of one image of {shape[1]} x {shape[2]}: {1000 * old:.1f} ms before, '
        f'{1000 * new:.1f} ms after, on this machine as busy as it is (5 turns, '
        f'{torch.get_num_threads()} threads).'
    )

    meta = dict(checkpoint.get('meta') or {})
    meta['sparse'] = dict(keep_mass=args.keep_mass, by=args.by, grid=grid)
    if args.deploy:
        meta['deploy_grid'] = grid
    with whole_file(config_out) as text:
        masked_cfg.dump(text)
        write_checkpoint({'meta': meta, 'state_dict': masked.cpu().state_dict()}, out)
    print(f'Wrote {out} and its config:\n  python tools/test.py {config_out} {out}')


if __name__ == '__main__':
    start(parse_args, main, 'sparsify_priors.py')
