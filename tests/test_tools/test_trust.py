"""No command runs what a checkpoint holds, unless it is told to trust it."""

import os
import zipfile

import pytest
import torch

from .test_visualization import CONFIG, ROOT, checkpoint, run  # noqa: F401


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
SEGMENTATION = (
    ROOT / 'configs/segmentation/spvit-mini_upernet_1xb16-700i_digit-scenes-64x96.py'
)
LOADS['to timm'] = (
    'model_converters/convert.py {checkpoint} {folder}/a.pth --to timm --config {config}'
)
COMMANDS['visualization/show_segmentation.py'] = (
    f'{SEGMENTATION} {{checkpoint}} --out {{folder}}/a.png'
)
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
    with pytest.raises(SystemExit) as end:
        run(*command(case, path, tmp_path, images))
    assert end.value.code == 2
    assert not ran.exists()
    message = capsys.readouterr().err
    assert 'is refused: it asks for `posix.mkdir`' in message
    assert '--trust-checkpoint' in message


def spoil(path, kind):
    """Make a file of ``kind`` of a good checkpoint."""
    content = torch.load(path)
    first = next(iter(content['state_dict']))
    contents = {
        'bare tensor': content['state_dict'][first],
        'bare list': [1.0, 2.0],
        'list': dict(state_dict=list(content['state_dict'].values())),
        'string': dict(state_dict='weights'),
        'floats': dict(state_dict={**content['state_dict'], first: 0.5}),
        'nothing': dict(state_dict={}),
        'model': dict(model=content['state_dict'], epoch=3),
    }
    bad = path.with_name(f'{kind.replace(" ", "_")}.pth')
    if kind == 'other zip':
        with zipfile.ZipFile(bad, 'w') as archive:
            archive.writestr('readme.txt', 'hello')
    elif kind == 'truncated':
        bad.write_bytes(path.read_bytes()[:9000])
    else:
        torch.save(contents[kind], bad)
    return bad


# What is no checkpoint, and what the error says of it.
SPOILED = {
    'bare tensor': 'it is a Tensor',
    'bare list': 'it is a list',
    'list': 'its `state_dict` is a list',
    'string': 'its `state_dict` is a str',
    'floats': "as 'backbone.cls_token', a float",
    'nothing': 'its `state_dict` is empty',
    'model': 'Files of other codebases',
    'other zip': 'is a zip archive, but not one of torch.save',
    'truncated': 'damaged or was only partly downloaded',
}


# One loader opens all: each command meets two kinds, each kind two commands or more.
@pytest.mark.parametrize(
    ('case', 'kinds'),
    [
        (case, [list(SPOILED)[(i + k) % len(SPOILED)] for k in (0, 4)])
        for i, case in enumerate(CASES)
        if case != 'model_converters/convert.py'  # test_convert.py
    ],
)
def test_a_command_says_what_is_no_checkpoint(
    case,
    kinds,
    checkpoint,  # noqa: F811
    tmp_path,
    capsys,
):
    good = checkpoint(CONFIG)
    images = tmp_path / 'images' / 'class'
    images.mkdir(parents=True)
    for kind in kinds:
        with pytest.raises(SystemExit) as end:
            run(*command(case, spoil(good, kind), tmp_path, images.parent))
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert SPOILED[kind] in message, kind
        assert 'Traceback' not in message


def command(case, path, tmp_path, images):
    if 'segmentation' in case:
        # With mmcv-lite, mmsegmentation itself cannot be imported.
        pytest.importorskip('mmseg.models')
    words = CASES[case].format(
        config=CONFIG, checkpoint=path, folder=tmp_path / 'out', images=images
    )
    return words.split()


def test_a_trusted_checkpoint_is_opened(poisoned, tmp_path):
    path, ran, _ = poisoned
    out = tmp_path / 'priors.png'
    run(
        'visualization/show_priors.py', CONFIG, path, '--trust-checkpoint', '--out', out
    )  # fmt: skip
    assert out.exists()
    assert ran.exists()
