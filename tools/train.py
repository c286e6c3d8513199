#!/usr/bin/env python
"""Train a model."""

from spvit_mm.engine import launch


def main(argv: list) -> None:
    parser = launch.ArgumentParser(prog='train.py', description=__doc__)
    launch.add_train_arguments(parser)
    args = parser.parse_args(argv)
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.run_training(launch.apply_train_options(cfg, args))


if __name__ == '__main__':
    launch.run_cli(main, 'train.py')
