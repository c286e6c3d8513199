#!/usr/bin/env python
"""Overlay what a classification rests on, for one model or two side by side, and
check it by removing patches."""

import argparse
import os.path as osp
from importlib.util import find_spec

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start

# Of which a PNG can be drawn, 258 pixels a row.
MOST_PICTURES = 250


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='show_relevance.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--compare',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help='a second model, such as the plain ViT, beside the first; --cfg-options '
        'changes both configs',
    )
    parser.add_argument(
        '--images', nargs='+', help='image files (default: of the test data set)'
    )
    parser.add_argument(
        '--count',
        type=number(1, MOST_PICTURES),
        default=4,
        help='images of the data set (default: 4)',
    )
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=['gradient', 'rollout', 'gradcam'],
        default=['gradient', 'rollout'],
        help='gradient: gradient-weighted attention; rollout; gradcam: needs the '
        'grad-cam package (default: gradient rollout)',
    )
    parser.add_argument(
        '--target',
        type=number(0),
        help='class to explain (default: the predicted one)',
    )
    parser.add_argument(
        '--perturb',
        type=number(0),
        default=0,
        metavar='N',
        help='perturbation test on N images of the test data set (default: none)',
    )
    parser.add_argument(
        '--out', help='the PNG to write (default: relevance.png beside the checkpoint)'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint], args.compare)
    return args


def main(argv: list) -> None:
    from spvit_mm.apis import beside, load_classifier, load_samples
    from spvit_mm.explain import draw_relevance
    from spvit_mm.utils import UserError, check_new_file, save_figure

    args = parse_args(argv)
    if 'gradcam' in args.methods and find_spec('pytorch_grad_cam') is None:
        raise UserError(
            '--methods gradcam needs the grad-cam package: pip install grad-cam'
        )
    if args.out is None:
        args.out = beside(args.checkpoint, 'relevance.png')
    out = check_new_file(args.out, ('.png',), force=True)

    columns, captions, rows, pictures = [], [], [], None
    pairs = [(args.config, args.checkpoint)]
    if args.compare:
        pairs.append(args.compare)
    names = short_names([config for config, _ in pairs])
    for name, (config, checkpoint) in zip(names, pairs, strict=True):
        cfg, model = load_classifier(config, checkpoint, args.cfg_options)
        classes = getattr(model.head, 'num_classes', None)
        if args.target is not None and classes and args.target >= classes:
            raise UserError(
                f'--target takes a class of the model, from 0 to {classes - 1}, got '
                f'{args.target}.'
            )
        samples = load_samples(cfg, model, args.images, args.count)
        pictures = pictures or [sample.picture for sample in samples]
        found = explain(model, samples, args)
        for method, maps, words in found:
            columns.append((f'{name}\n{method}', maps))
            captions.append(words)
        if args.perturb:
            rows += perturb(cfg, model, name, args)
    save_figure(draw_relevance(pictures, columns, captions), out, dpi=120)
    print(f'The relevance of {len(pictures)} images is drawn in {out}')
    if rows:
        report(rows, osp.splitext(out)[0] + '_perturbation.csv')


def short_names(configs):
    """Names of configs that tell them apart, numbered where theirs do not."""
    whole = [osp.splitext(osp.basename(config))[0] for config in configs]
    for names in ([name.split('_1x')[0] for name in whole], whole):
        if len(set(names)) == len(names):
            return names
    return [f'{name} ({i})' for i, name in enumerate(whole, 1)]


def batches(samples, size=32):
    """Lists of samples, each of images of equal size."""
    shapes = {tuple(sample.inputs.shape) for sample in samples}
    if len(shapes) > 1:
        size = 1
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def stack(samples):
    """The images of samples, (B, 3, h, w)."""
    import torch

    return torch.stack([sample.inputs for sample in samples])


def explain(model, samples, args):
    """Maps and captions of each method."""
    import torch

    from spvit_mm.explain import class_scores, relevance_maps
    from spvit_mm.utils import with_progress

    found = []
    for method in args.methods:
        maps, words = [], []
        for batch in with_progress(batches(samples)):
            inputs = stack(batch)
            with torch.no_grad():
                scores = class_scores(model, inputs).softmax(dim=1)
            targets = scores.argmax(dim=1)
            if args.target is not None:
                targets = torch.full_like(targets, args.target)
            maps += relevance_maps(model, inputs, targets, method)
            for row, target in zip(scores, targets.tolist(), strict=True):
                words.append(f'class {target}: {row[target]:.0%}')
        found.append((method, maps, words))
    return found


def perturb(cfg, model, name, args):
    """Rows of the perturbation table, the last one for a random order."""
    import torch

    from spvit_mm.apis import load_samples
    from spvit_mm.explain import perturbation_test, relevance_maps
    from spvit_mm.utils import UserError, with_progress

    samples = load_samples(cfg, model, None, args.perturb)
    if any(sample.label is None for sample in samples):
        raise UserError('--perturb needs a test data set with labels.')
    if len({sample.inputs.shape for sample in samples}) > 1:
        raise UserError(
            '--perturb needs images of one size: let the test pipeline resize and crop.'
        )
    inputs = stack(samples)
    labels = [sample.label for sample in samples]
    orders = {
        method: torch.cat(
            [
                relevance_maps(model, stack(batch), None, method)
                for batch in with_progress(batches(samples))
            ]
        )
        for method in args.methods
    }
    any_map = orders[args.methods[0]]
    generator = torch.Generator().manual_seed(0)
    orders['random order'] = torch.rand(any_map.shape, generator=generator)
    return [
        (name, method, perturbation_test(model, inputs, labels, maps), len(labels))
        for method, maps in with_progress([*orders.items()])
    ]


def report(rows, path):
    """Print the areas and write the curves."""
    from spvit_mm.utils import write_csv

    width = max(len(name) for name, *_ in rows)
    print(
        f'Perturbation test on {rows[0][-1]} images: area under the accuracy while '
        'patches are removed'
    )
    print(
        f'{"model":<{width}}  {"order by":<12}  most first (low is good)  least first'
    )
    for name, method, p, _ in rows:
        print(
            f'{name:<{width}}  {method:<12}  {p.most_area:24.3f}  {p.least_area:11.3f}'
        )
    curves = [['model', 'method', 'removed', 'most_first', 'least_first']]
    for name, method, p, _ in rows:
        for values in zip(p.removed, p.most, p.least, strict=True):
            curves.append([name, method, *(f'{v:.4f}' for v in values)])
    write_csv(path, curves)
    print(f'The curves are in {path}')


if __name__ == '__main__':
    start(parse_args, main, 'show_relevance.py')
