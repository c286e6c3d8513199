#!/usr/bin/env python
"""Test (and evaluate) a checkpoint."""

import mmengine
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from spvit_mm.apis import (
    ArgumentParser,
    add_test_arguments,
    apply_test_options,
    load_config,
    run_cli,
    run_test,
)


def main(argv: list) -> None:
    parser = ArgumentParser(prog='test.py', description=__doc__)
    add_test_arguments(parser)
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    cfg = apply_test_options(cfg, args)

    predictions = args.out is not None and args.out_item != 'metrics'
    metrics = (DumpResults(out_file_path=args.out),) if predictions else ()
    values = run_test(cfg, metrics)
    if args.out_item == 'metrics' and is_main_process():
        mmengine.dump(values, args.out)


if __name__ == '__main__':
    run_cli(main, 'test.py')
