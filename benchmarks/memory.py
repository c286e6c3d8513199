#!/usr/bin/env python
"""Peak memory of SP-ViT at large images, beside the same model without priors.

Inference of SP-ViT-S and training of SP-DeiT-Ti at 1024 x 1024 (4,096 tokens), one
image, on the CPU in float32; every figure is the peak resident memory of a process
of its own. ``start`` is the same process before the forward.

    python benchmarks/memory.py
"""

import argparse
import json
from pathlib import Path

from measuring import check_folder, resident_peak, run_apart, write_csv

CASES = {
    'inference of SP-ViT-S': dict(arch='spvit-small', train=False),
    'training of SP-DeiT-Ti': dict(arch='deit-tiny', train=True),
}


def measure(case, without_priors, size, kernel):
    """Build the model of a case and run it once on one image; a row of the table."""
    import torch
    from mmpretrain.registry import MODELS

    import spvit_mm  # noqa: F401

    torch.manual_seed(0)
    settings = CASES[case]
    layers = dict(num_spsa_layers=0) if without_priors else {}
    model = MODELS.build(
        dict(
            type='mmpretrain.SPViT',
            arch=settings['arch'],
            img_size=size,
            out_type='featmap',
            attn_cfg=dict(type='SpatialPriorAttention', attn_impl=kernel),
            **layers,
        )
    ).train(settings['train'])
    images = torch.rand(1, 3, size, size)
    start = resident_peak()
    with torch.set_grad_enabled(settings['train']):
        (features,) = model(images)
        if settings['train']:
            features.square().mean().backward()
    return dict(
        case=case,
        layers=model.num_spsa_layers,
        size=size,
        kernel=kernel,
        start_mb=round(start),
        peak_mb=round(resident_peak()),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, default=1024, help='side of the image')
    parser.add_argument(
        '--kernel', default='auto', choices=['auto', 'eager', 'chunked', 'flex']
    )
    parser.add_argument('--out', type=Path, default=Path('outputs/memory.csv'))
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.size < 16:
        parser.error(f'--size must be at least one patch, 16 pixels, got {args.size}')
    if args.one:
        case, without_priors = args.one
        row = measure(case, bool(int(without_priors)), args.size, args.kernel)
        print(json.dumps(row))
        return
    check_folder(parser, args.out.parent)

    rows = []
    print('| case | SP-SA layers | tokens | peak MB | of it before the forward |')
    print('| --- | --- | --- | --- | --- |')
    tokens = (-(-args.size // 16)) ** 2
    for case in CASES:
        for without_priors in (0, 1):
            options = ('--size', args.size, '--kernel', args.kernel)
            try:
                row = run_apart(__file__, '--one', case, without_priors, *options)
            except RuntimeError as error:
                print(f'| {case} | failed | | | |\n{error}')
                continue
            rows.append(row)
            print(
                f'| {case} | {row["layers"]} | {tokens} | {row["peak_mb"]} | '
                f'{row["start_mb"]} |',
                flush=True,
            )
    if rows:
        write_csv(args.out, rows)
        print(f'Wrote {args.out}')
    if len(rows) < 2 * len(CASES):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
