"""No command runs what a checkpoint holds, unless it is told to trust it."""

import os

import pytest
import torch

from .test_visualization import CONFIG, checkpoint, run  # noqa: F401


class Poison:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# Each command, with a config and a checkpoint that is all right but for its `meta`.
COMMANDS = {
    'test.py': '{config} {checkpoint} --work-dir {folder}/work',
    'train.py': '{config} --resume {checkpoint} --work-dir {folder}/work',
    'visualization/show_priors.py': '{config} {checkpoint} --out {folder}/a.png',
    'visualization/show_attention.py': '{config} {checkpoint} --query 1 1',
    'visualization/show_relevance.py': '{config} {checkpoint} --out {folder}/a.png',
    'analysis/binarize_priors.py': '{config} {checkpoint} --out {folder}/a.png',
    'deploy/export.py': '{config} {checkpoint} {folder}/a.onnx',
    'model_converters/reparameterize_model.py': '{config} {checkpoint} {folder}/a.pth',
    'model_converters/sparsify_priors.py': '{config} {checkpoint} {folder}/a.pth',
    'model_converters/convert.py': '{checkpoint} {folder}/a.pth --from deit',
    'dataset_converters/generate_token_labels.py': (
        '{config} {checkpoint} {images} {folder}/labels'
    ),
}
LOADS = {
    'load_from': 'train.py {config} --work-dir {folder}/work --cfg-options '
    'load_from={checkpoint}',
    'init_cfg': 'train.py {config} --work-dir {folder}/work --cfg-options '
    'model.init_cfg.type=Pretrained model.init_cfg.checkpoint={checkpoint}',
}
CASES = {**{name: f'{name} {rest}' for name, rest in COMMANDS.items()}, **LOADS}


@pytest.fixture
def poisoned(checkpoint, tmp_path):  # noqa: F811
    path, ran = tmp_path / 'poisoned.pth', tmp_path / 'ran'
    content = torch.load(checkpoint(CONFIG))
    torch.save({**content, 'meta': {'note': Poison(str(ran))}}, path)
    images = tmp_path / 'images' / 'class'
    images.mkdir(parents=True)
    return path, ran, images.parent


@pytest.mark.parametrize('case', CASES)
def test_a_command_refuses_what_would_run(case, poisoned, tmp_path, capsys):
    path, ran, images = poisoned
    words = CASES[case].format(
        config=CONFIG, checkpoint=path, folder=tmp_path / 'out', images=images
    )
    tool, *arguments = words.split()
    with pytest.raises(SystemExit) as end:
        run(tool, *arguments)
    assert end.value.code == 2
    assert not ran.exists()
    message = capsys.readouterr().err
    assert 'is refused: it asks for `posix.mkdir`' in message
    assert '--trust-checkpoint' in message


def test_a_trusted_checkpoint_is_opened(poisoned, tmp_path):
    path, ran, _ = poisoned
    out = tmp_path / 'priors.png'
    run(
        'visualization/show_priors.py', CONFIG, path, '--trust-checkpoint', '--out', out
    )  # fmt: skip
    assert out.exists()
    assert ran.exists()
