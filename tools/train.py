#!/usr/bin/env python
"""Train a model."""

from spvit_mm_cli import parse_train_args, start


def main(argv: list) -> None:
    from spvit_mm.apis import build_trainer, load_config, merge_train_args

    args = parse_train_args(argv)
    cfg = merge_train_args(load_config(args.config, args.cfg_options), args)
    runner = build_trainer(cfg, args)
    runner.train()


if __name__ == '__main__':
    start(parse_train_args, main, 'train.py')
