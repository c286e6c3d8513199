"""What a command does before torch and OpenMMLab are imported: its options.

``--help``, a mistyped option and a path that leads nowhere are answered in a moment,
since nothing but the standard library is imported here. A package beside
:mod:`spvit_mm`, because importing anything of that one registers all of it.
"""

from .options import number
from .parser import TRUST, ArgumentParser, add_cfg_options, start
from .paths import checkpoint_problem, config_problem
from .train_test import parse_test_args, parse_train_args

__all__ = [
    'TRUST',
    'ArgumentParser',
    'add_cfg_options',
    'checkpoint_problem',
    'config_problem',
    'number',
    'parse_test_args',
    'parse_train_args',
    'start',
]
