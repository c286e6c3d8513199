#!/usr/bin/env python
"""Test (and evaluate) a checkpoint."""

from spvit_mm_cli import parse_test_args, start


def main(argv: list) -> None:
    import mmengine
    from mmengine.dist import is_main_process

    from spvit_mm.apis import build_tester, load_config, merge_test_args

    args = parse_test_args(argv)
    cfg = merge_test_args(load_config(args.config, args.cfg_options), args)
    runner = build_tester(cfg, args)
    metrics = runner.test()
    if args.out_item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    start(parse_test_args, main, 'test.py')
