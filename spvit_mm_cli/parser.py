"""A command's parser, and what leads from it to the command."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Optional

from .paths import checkpoint_problem, config_problem

TRUST = '--trust-checkpoint'


class ArgumentParser(argparse.ArgumentParser):
    """A parser of our commands, all of which may be told to trust a checkpoint.

    Its ``key=value`` options end in a usage error as well.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_argument(
            TRUST,
            action='store_true',
            help='open checkpoints with full pickle, which runs whatever code a file '
            'holds: for files whose author you trust (default: refuse such a file)',
        )

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except (ValueError, AssertionError) as error:  # of mmengine's DictAction
            self.error(f'--cfg-options takes key=value pairs ({error})')

    def check_paths(
        self,
        configs: Iterable[str] = (),
        checkpoints: Iterable[str] = (),
        compare: Optional[tuple[str, str]] = None,
    ) -> None:
        """End with one line and exit code 2 for a path that leads to no file.

        Args:
            configs (Iterable[str]): Paths of configs.
            checkpoints (Iterable[str]): Paths or addresses of checkpoints.
            compare (tuple[str, str], optional): Config and checkpoint of another model.
        """
        if compare:
            configs, checkpoints = [*configs, compare[0]], [*checkpoints, compare[1]]
        problems = [*map(config_problem, configs)]
        problems += map(checkpoint_problem, checkpoints)
        for problem in filter(None, problems):
            self.exit(2, f'{self.prog}: error: {problem}\n')


class _CfgOptions(argparse.Action):
    """mmengine's DictAction, imported where the option is given."""

    def __call__(self, parser, namespace, values, option_string=None):
        from mmengine.config import DictAction

        action = DictAction(self.option_strings, self.dest, nargs=self.nargs)
        action(parser, namespace, values, option_string)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that changes entries of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_CfgOptions,
        metavar='KEY=VALUE',
        help='change entries of the config before all other options act on it: '
        'model.backbone.depth=12, key="[a,b]", key="[(a,b),(c,d)]" (quoted, without '
        'spaces)',
    )


def start(parse_args: Callable, main: Callable, prog: str) -> None:
    """Run a command line of this process.

    Args:
        parse_args (callable): Takes the list of arguments; ends the process for
            ``--help`` and for what is wrong with them.
        main (callable): Takes the list of arguments, parses them again, and works.
        prog (str): Name of the command, put before its messages.
    """
    parse_args(sys.argv[1:])  # what ends here has not waited for torch
    # Said by mmcv-lite at its import. None of our models needs that operator.
    warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention')
    from spvit_mm.apis import run_cli

    run_cli(main, prog)
