"""What a command answers before it has imported what its work needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from spvit_mm.convert.convert import CHOICES, SOURCES, TARGETS
from spvit_mm.explain import RELEVANCE_METHODS
from spvit_mm.explain.binarize import CRITERIA

ROOT = Path(__file__).parents[2]
TOOLS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob('tools/**/*.py')
    if path.name != 'launch.py'  # of the shell scripts, before torch's own launcher
)
# Runs a command as a script, and says which of the slow packages it has imported.
CODE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as end:
    print('code', end.code)
print({'torch', 'mmengine', 'mmcv', 'mmpretrain', 'matplotlib'} & sys.modules.keys())
"""


def answer(*arguments):
    done = subprocess.run(
        [sys.executable, '-c', CODE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_all_commands_are_tried():
    assert 'tools/train.py' in TOOLS
    assert len(TOOLS) >= 12


@pytest.mark.parametrize('tool', TOOLS)
def test_help_waits_for_nothing(tool):
    done = answer(tool, '--help')
    assert done.stdout.startswith(f'usage: {Path(tool).name}')
    assert done.stdout.endswith('code 0\nset()\n')


# What a command takes beside a config and a checkpoint.
MORE = {
    'export.py': ['a.onnx'],
    'generate_token_labels.py': ['images', 'out'],
    'reparameterize_model.py': ['out.pth'],
    'show_attention.py': ['--query', '0', '0'],
    'sparsify_priors.py': ['out.pth'],
}
CONFIG = 'configs/classification/spvit-mini_1xb64-50e_digits.py'


@pytest.mark.parametrize('tool', TOOLS)
def test_a_wrong_path_waits_for_nothing(tool):
    name = Path(tool).name
    if name == 'convert.py':
        arguments, what = ['nowhere.pth', 'out.pth'], 'checkpoint nowhere.pth'
    elif name in ('train.py', 'get_flops.py'):
        arguments, what = ['nowhere.py'], 'config nowhere.py'
    else:
        arguments, what = [CONFIG, 'nowhere.pth'], 'checkpoint nowhere.pth'
    done = answer(tool, *arguments, *MORE.get(name, []))
    assert done.stderr.startswith(f'{name}: error: The {what} ')
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == 'code 2\nset()\n'


@pytest.mark.parametrize(
    ('tool', 'option', 'accepted'),
    [
        ('analysis/binarize_priors.py', '--by', CRITERIA),
        ('visualization/show_relevance.py', '--methods', RELEVANCE_METHODS),
        ('model_converters/convert.py', '--from', SOURCES),
        ('model_converters/convert.py', '--to', TARGETS),
        *(
            ('model_converters/convert.py', f'--{name}', filter(None, values))
            for name, values in CHOICES.items()
        ),
    ],
)
def test_choices_are_those_of_the_package(tool, option, accepted):
    """A parser spells out what it could import, to import nothing."""
    usage = answer(f'tools/{tool}', '--help').stdout
    assert f'{option} {{{",".join(accepted)}}}' in usage
