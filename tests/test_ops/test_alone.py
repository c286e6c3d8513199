import shutil
import subprocess
import sys
from pathlib import Path

import spvit_mm.ops

CODE = """
import sys, torch
from attention_of_mine import spatial_prior_attention
q = torch.randn(1, 2, 6, 8)
out = spatial_prior_attention(q, q, q, torch.ones(2, 3, 5), (2, 3))
assert out.shape == q.shape
print(*{'mmengine', 'mmcv', 'mmpretrain', 'spvit_mm'} & set(sys.modules))
"""


def test_a_copy_of_the_folder_needs_torch_alone(tmp_path):
    folder = Path(spvit_mm.ops.__file__).parent
    shutil.copytree(folder, tmp_path / 'attention_of_mine')
    done = subprocess.run(
        [sys.executable, '-c', CODE],
        cwd=tmp_path,
        env={'PYTHONPATH': str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
