#!/usr/bin/env python
"""Test (and evaluate) a checkpoint."""

import mmengine
from mmengine.dist import is_main_process

from spvit_mm.apis import (
    build_tester,
    load_config,
    merge_test_args,
    parse_test_args,
    run_cli,
)


def main(argv: list) -> None:
    args = parse_test_args(argv)
    cfg = merge_test_args(load_config(args.config, args.cfg_options), args)
    runner = build_tester(cfg, args)
    metrics = runner.test()
    if args.out_item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    run_cli(main, 'test.py')
