import re
import subprocess
import sys
from pathlib import Path

import pytest

from spvit_mm.utils.requirements import check_requirements


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
    root = Path(__file__).parents[1]
    hook = re.search(r'rev: v(\S+)', (root / '.pre-commit-config.yaml').read_text())
    assert f'ruff=={hook[1]}\n' in (root / 'requirements/dev.txt').read_text()
