"""What the command lines call: options, configs, training, testing, export."""

from .cli import (
    ArgumentParser,
    add_cfg_options,
    add_common_arguments,
    building,
    run_cli,
)
from .complexity import attention_flops, register_flop_counter
from .configs import (
    build_model,
    build_runner,
    check_checkpoint,
    distribute_on_cpu,
    image_shape,
    load_config,
    load_trained_model,
    scope_of,
)
from .samples import Sample, load_model, load_samples
from .test import add_test_arguments, apply_test_options, run_test
from .train import (
    add_train_arguments,
    apply_train_options,
    find_resume_checkpoint,
    run_training,
)

__all__ = [
    'ArgumentParser',
    'Sample',
    'add_cfg_options',
    'add_common_arguments',
    'add_test_arguments',
    'add_train_arguments',
    'apply_test_options',
    'apply_train_options',
    'attention_flops',
    'build_model',
    'build_runner',
    'building',
    'check_checkpoint',
    'distribute_on_cpu',
    'find_resume_checkpoint',
    'image_shape',
    'load_config',
    'load_model',
    'load_samples',
    'load_trained_model',
    'register_flop_counter',
    'run_cli',
    'run_test',
    'run_training',
    'scope_of',
]
