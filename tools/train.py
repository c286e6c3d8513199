#!/usr/bin/env python
"""Train a model."""

from spvit_mm.apis import (
    ArgumentParser,
    add_train_arguments,
    apply_train_options,
    load_config,
    run_cli,
    run_training,
)


def main(argv: list) -> None:
    parser = ArgumentParser(prog='train.py', description=__doc__)
    add_train_arguments(parser)
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    run_training(apply_train_options(cfg, args))


if __name__ == '__main__':
    run_cli(main, 'train.py')
