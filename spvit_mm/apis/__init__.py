"""What the command lines call: options, configs, training, testing, export."""

from spvit_mm_cli import (
    ArgumentParser,
    add_cfg_options,
    number,
    parse_test_args,
    parse_train_args,
)

from .cli import building, run_cli
from .complexity import attention_flops
from .configs import (
    beside,
    build_model,
    change_config,
    check_checkpoint,
    check_device,
    check_entries,
    check_finite,
    check_size,
    image_channels,
    image_shape,
    load_config,
    load_trained_model,
    load_whole,
    scope_of,
)
from .runner import build_runner, distribute_on_cpu
from .samples import (
    Sample,
    load_classifier,
    load_model,
    load_samples,
    reverses_channels,
)
from .test import build_tester, merge_test_args
from .train import (
    build_trainer,
    find_resume_checkpoint,
    merge_train_args,
)

__all__ = [
    'ArgumentParser',
    'Sample',
    'add_cfg_options',
    'attention_flops',
    'beside',
    'build_model',
    'build_runner',
    'build_tester',
    'build_trainer',
    'building',
    'change_config',
    'check_checkpoint',
    'check_device',
    'check_entries',
    'check_finite',
    'check_size',
    'distribute_on_cpu',
    'find_resume_checkpoint',
    'image_channels',
    'image_shape',
    'load_classifier',
    'load_config',
    'load_model',
    'load_samples',
    'reverses_channels',
    'load_trained_model',
    'load_whole',
    'merge_test_args',
    'merge_train_args',
    'number',
    'parse_test_args',
    'parse_train_args',
    'run_cli',
    'scope_of',
]
