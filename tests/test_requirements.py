import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from spvit_mm.utils.requirements import check_requirements

ROOT = Path(__file__).parents[1]


def test_missing_is_named():
    with pytest.raises(
        ImportError, match=r'needs mmnothing>=1.0, which is not installed'
    ):
        check_requirements({'mmnothing': '1.0'})


def test_too_old_is_named():
    with pytest.raises(
        ImportError, match=r'needs mmcv>=99.0, but mmcv \d.* is installed'
    ):
        check_requirements({'mmcv': '99.0'})


def test_import_without_mmpretrain_ends_in_one_line():
    code = "import sys; sys.modules['mmpretrain'] = None; import spvit_mm"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 1
    assert (
        run.stderr.strip()
        .splitlines()[-1]
        .startswith(
            'ImportError: spvit_mm needs mmpretrain>=1.2.0, which is not installed. '
            "Install the maintained forks with `pip install 'spvit-mm[onedl]'`"
        )
    )


def test_pre_commit_has_the_ruff_of_the_requirements():
    hook = re.search(r'rev: v(\S+)', (ROOT / '.pre-commit-config.yaml').read_text())
    assert f'ruff=={hook[1]}\n' in (ROOT / 'requirements/dev.txt').read_text()


@pytest.mark.parametrize('version', ['3.10', '3.11', '3.12', '3.13'])
def test_each_python_has_one_pin_of_each_package(version):
    """A package that a marker leaves out is missing without a word from pip."""
    lines = [
        line
        for name in ('readme', 'dev', 'deploy')
        for line in (ROOT / f'requirements/{name}.txt').read_text().splitlines()
        if line and not line.startswith(('#', '-r'))
    ]
    every = [Requirement(line) for line in lines]
    environment = dict(python_version=version)
    here = [r for r in every if not r.marker or r.marker.evaluate(environment)]
    assert sorted(r.name for r in here) == sorted({r.name for r in every})
    assert all([s.operator for s in r.specifier] == ['=='] for r in here)
