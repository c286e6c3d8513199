"""Mistakes of users at the commands other than training and testing.

The table of docs/reliability.md under "Other commands" is these cases; where it differs,
the last test prints the lines that belong there.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
import pytest
import torch
from PIL import Image

from spvit_mm.apis import (
    build_model,
    load_config,
    load_model,
    load_samples,
    run_cli,
)
from spvit_mm.datasets.token_labels import write_label_map
from spvit_mm.explain import write_gif
from spvit_mm.utils import UserError, new_figure, save_figure, write_csv

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
PRIORS = CONFIGS / 'classification/spvit-mini_1xb64-50e_digits.py'
PLAIN = CONFIGS / 'classification/spvit-mini_0spsa_1xb64-50e_digits.py'
SCENES = CONFIGS / 'segmentation/spvit-mini_upernet_1xb16-700i_digit-scenes-64x96.py'
TEACHER = CONFIGS / 'token_labeling/resnet-mini_1xb64-10e_digits.py'

FLOPS = 'tools/analysis/get_flops.py'
BINARIZE = 'tools/analysis/binarize_priors.py'
SHOW_PRIORS = 'tools/visualization/show_priors.py'
ATTENTION = 'tools/visualization/show_attention.py'
RELEVANCE = 'tools/visualization/show_relevance.py'
SEGMENTATION = 'tools/visualization/show_segmentation.py'
LABELS = 'tools/dataset_converters/generate_token_labels.py'
DEPLOY = 'tools/model_converters/reparameterize_model.py'
STUDY = 'benchmarks/study.py'


class Case(NamedTuple):
    """One mistake.

    Attributes:
        kind (str): What is wrong, in words: the first column of the table.
        command (str): The command, names in braces being those of ``files``.
        says (str): What its message holds: the second column.
    """

    kind: str
    command: str
    says: str


CASES = [
    Case(
        'a checkpoint with nan, drawn',
        f'{SHOW_PRIORS} {{priors}} {{nan.pth}} --out {{new}}/a.png',
        'holds nan or infinity, first in backbone.layers.1.attn.qkv.weight: the '
        'training that wrote it diverged. Take an earlier checkpoint.',
    ),
    Case(
        'a checkpoint with nan, folded into constants',
        f'{DEPLOY} {{priors}} {{nan.pth}} {{new}}/a.pth',
        'holds nan or infinity, first in backbone.layers.1.attn.qkv.weight',
    ),
    Case(
        'a teacher with nan',
        f'{LABELS} {{teacher}} {{teacher_nan.pth}} {{images}} {{new}}/maps',
        'holds nan or infinity, first in backbone.conv1.weight',
    ),
    Case(
        'priors that overflow, of finite weights',
        f'{SHOW_PRIORS} {{priors}} {{huge.pth}} --out {{new}}/a.png',
        'The prior of layer 1 holds nan or infinity.',
    ),
    Case(
        'pictures that become nan: data_preprocessor.std is 0',
        f'{RELEVANCE} {{zero_std.py}} {{priors.pth}} --out {{new}}/a.png',
        'holds nan or infinity after the test pipeline and the data_preprocessor. '
        'Check the file, and mean and std of data_preprocessor.',
    ),
    Case(
        'the same for a segmentor',
        f'{SEGMENTATION} {{zero_std_scenes.py}} {{scenes.pth}} --out {{new}}/a.png',
        'holds nan or infinity. Check the file, and mean and std of data_preprocessor.',
    ),
    Case(
        'the same for the images that binarisation measures',
        f'{BINARIZE} {{zero_std.py}} {{priors.pth}} --out {{new}}/a.png',
        'is nan or infinite for images of the training data.',
    ),
    Case(
        'a folder given as a picture',
        f'{ATTENTION} {{priors}} {{priors.pth}} --query 1 1 --image {{images}}',
        'is a folder. Give the files.',
    ),
    Case(
        'a picture that is not there',
        f'{RELEVANCE} {{priors}} {{priors.pth}} --images {{new}}/a.png',
        'a.png does not exist.',
    ),
    Case(
        'an empty name of a picture to read',
        f"{ATTENTION} {{priors}} {{priors.pth}} --query 1 1 --image ''",
        "The picture '' does not exist.",
    ),
    Case(
        'a link to a picture that is gone',
        f'{RELEVANCE} {{priors}} {{priors.pth}} --images {{broken.png}}',
        'is a link to nowhere.png, which does not exist.',
    ),
    Case(
        'an empty file as a picture',
        f'{RELEVANCE} {{priors}} {{priors.pth}} --images {{empty.png}}',
        'empty.png cannot be read: it is empty.',
    ),
    Case(
        'a text as a picture',
        f'{RELEVANCE} {{priors}} {{priors.pth}} --images {{junk.pth}}',
        'cannot be read: AssertionError: failed to load image',
    ),
    Case(
        'a picture that was only partly downloaded',
        f'{ATTENTION} {{priors}} {{priors.pth}} --query 1 1 --image {{cut.png}}',
        'cut.png cannot be read',
    ),
    Case(
        'a picture smaller than a patch',
        f'{RELEVANCE} {{any_size.py}} {{priors.pth}} --images {{tiny.png}}',
        'tiny.png, after the test pipeline: 2 x 3 pixels (h x w) are less than one patch '
        'of the model, 4 x 4.',
    ),
    Case(
        'a config without test data, whose pipeline prepares pictures',
        f'{ATTENTION} {{no_test.py}} {{priors.pth}} --query 1 1 --image {{picture.png}}',
        'no_test.py lacks test_dataloader. It needs test_dataloader.',
    ),
    Case(
        'a file given as the folder of images',
        f'{LABELS} {{teacher}} {{teacher.pth}} {{picture.png}} {{new}}',
        'is a file.',
    ),
    Case(
        'a folder without images',
        f'{LABELS} {{teacher}} {{teacher.pth}} {{full}} {{new}}',
        'Found 0 files in subfolders of',
    ),
    Case(
        'a picture among the images that cannot be read',
        f'{LABELS} {{teacher}} {{teacher.pth}} {{images_one_bad}} {{labels}} --size 24 '
        '--num-workers 0',
        'bad.png (8 bytes) cannot be read',
    ),
    Case(
        '--count 0',
        f'{RELEVANCE} {{priors}} {{junk.pth}} --count 0',
        "--count: takes whole numbers from 1 to 250, got '0'",
    ),
    Case(
        '--count 100000: more than a PNG can hold',
        f'{RELEVANCE} {{priors}} {{junk.pth}} --count 100000',
        "--count: takes whole numbers from 1 to 250, got '100000'",
    ),
    Case(
        '--perturb -1',
        f'{RELEVANCE} {{priors}} {{junk.pth}} --perturb -1',
        "--perturb: takes whole numbers from 0 on, got '-1'",
    ),
    Case(
        '--target of a class that the model does not have',
        f'{RELEVANCE} {{priors}} {{priors.pth}} --target 10 --images {{junk.pth}}',
        '--target takes a class of the model, from 0 to 9, got 10.',
    ),
    Case(
        '--number 0',
        f'{SEGMENTATION} {{scenes}} {{junk.pth}} --number 0',
        "--number: takes whole numbers from 1 to 250, got '0'",
    ),
    Case(
        '--grid 0 3',
        f'{SHOW_PRIORS} {{priors}} {{junk.pth}} --grid 0 3',
        "--grid: takes whole numbers from 1 on, got '0'",
    ),
    Case(
        '--grid 9999999 9999999: more than the memory',
        f'{SHOW_PRIORS} {{priors}} {{priors.pth}} --grid 9999999 9999999',
        'There is not enough memory (tried to allocate ',
    ),
    Case(
        '--grid that is no number, of a deploy form',
        f'{DEPLOY} {{priors}} {{junk.pth}} {{new}}/a.pth --grid 3 x',
        "--grid: takes whole numbers from 1 on, got 'x'",
    ),
    Case(
        '--query outside of the grid',
        f'{ATTENTION} {{priors}} {{priors.pth}} --query 6 0 --out-dir {{new}}',
        '`query` must be a row in 0..5 and a column in 0..5, the grid of this image',
    ),
    Case(
        '--query -1 0',
        f'{ATTENTION} {{priors}} {{junk.pth}} --query -1 0',
        "--query: takes whole numbers from 0 on, got '-1'",
    ),
    Case(
        '--layers of a layer that the model does not have',
        f'{ATTENTION} {{priors}} {{priors.pth}} --query 1 1 --layers 5 --image '
        '{junk.pth}',
        '--layers takes numbers in 1..4, got [5].',
    ),
    Case(
        '--keep 0',
        f'{BINARIZE} {{priors}} {{junk.pth}} --keep 0',
        "--keep: takes numbers above 0 up to 1, got '0'",
    ),
    Case(
        '--lr-factor nan',
        f'{BINARIZE} {{priors}} {{junk.pth}} --lr-factor nan',
        "--lr-factor: takes numbers above 0, got 'nan'",
    ),
    Case(
        '--mass-batches 0',
        f'{BINARIZE} {{priors}} {{junk.pth}} --mass-batches 0',
        "--mass-batches: takes whole numbers from 1 on, got '0'",
    ),
    Case(
        '--shape 0',
        f'{FLOPS} {{priors}} --shape 0',
        "--shape: takes whole numbers from 1 on, got '0'",
    ),
    Case(
        '--shape with three numbers',
        f'{FLOPS} {{priors}} --shape 8 8 8',
        '--shape takes one or two positive numbers, got [8, 8, 8].',
    ),
    Case(
        '--shape smaller than a patch',
        f'{FLOPS} {{priors}} --shape 8 3',
        '--shape: 8 x 3 pixels (h x w) are less than one patch of the model, 4 x 4.',
    ),
    Case(
        '--size 0 of a teacher',
        f'{LABELS} {{teacher}} {{junk.pth}} {{images}} {{new}} --size 0',
        "--size: takes whole numbers from 1 on, got '0'",
    ),
    Case(
        '--num-workers -1',
        f'{LABELS} {{teacher}} {{junk.pth}} {{images}} {{new}} --num-workers -1',
        "--num-workers: takes whole numbers from 0 on, got '-1'",
    ),
    Case(
        '--preview -1',
        f'{LABELS} {{teacher}} {{junk.pth}} {{images}} {{new}} --preview -1',
        "--preview: takes whole numbers from 0 to 250, got '-1'",
    ),
    Case(
        '--seeds 0',
        f'{STUDY} prior --seeds 0',
        "--seeds: takes whole numbers from 1 on, got '0'",
    ),
    Case(
        '--epochs 0',
        f'{STUDY} prior --epochs 0',
        "--epochs: takes whole numbers from 1 on, got '0'",
    ),
    Case(
        'a config that is not there',
        f'{SHOW_PRIORS} nowhere.py {{junk.pth}} --out {{new}}/a.png',
        'The config nowhere.py cannot be read: it does not exist (seen from ',
    ),
    Case(
        'an empty name of a config',
        f"{SHOW_PRIORS} '' {{junk.pth}} --out {{new}}/a.png",
        "The config '' cannot be read: its name is empty.",
    ),
    Case(
        'a folder as a config',
        f'{FLOPS} {{images}}',
        'cannot be read: it is a folder. Give one of its .py files.',
    ),
    Case(
        'a file that is no config',
        f'{FLOPS} {{junk.pth}}',
        'cannot be read: it must end in .py, .yaml, .yml, .json.',
    ),
    Case(
        'a config with an error of syntax',
        f'{FLOPS} {{syntax.py}}',
        'cannot be read: SyntaxError: invalid syntax',
    ),
    Case(
        'a config without a model',
        f'{FLOPS} {{no_model.py}}',
        'no_model.py has no model.',
    ),
    Case(
        'a teacher of a config without a model',
        f'{LABELS} {{no_model.py}} {{teacher.pth}} {{images}} {{new}}',
        'no_model.py lacks model. It needs model.',
    ),
    Case(
        'a folder as the config of a teacher',
        f'{LABELS} {{images}} {{teacher.pth}} {{images}} {{new}}',
        'cannot be read: it is a folder.',
    ),
    Case(
        'a segmentor as a teacher',
        f'{LABELS} {{scenes}} {{scenes.pth}} {{images}} {{new}}',
        'is a config of mmseg; a teacher is a classifier of mmpretrain.',
    ),
    Case(
        'a classifier to draw segmentation of',
        f'{SEGMENTATION} {{priors}} {{priors.pth}} --out {{new}}/a.png',
        'is a config of mmpretrain; this command takes a segmentor, whose default_scope '
        'is mmseg.',
    ),
    Case(
        'a segmentor to draw relevance of',
        f'{RELEVANCE} {{scenes}} {{scenes.pth}} --out {{new}}/a.png',
        'is no image classifier, which this command takes: it has no head.',
    ),
    Case(
        'a model without priors to draw them of',
        f'{SHOW_PRIORS} {{plain}} {{plain.pth}} --out {{new}}/a.png',
        'has no spatial prior: no SP-SA layer (is `num_spsa_layers` 0 in its config?)',
    ),
    Case(
        'a model without priors to binarise',
        f'{BINARIZE} {{plain}} {{plain.pth}} --out {{new}}/a.png',
        'has no spatial prior: no SP-SA layer (is `num_spsa_layers` 0 in its config?)',
    ),
    Case(
        'a model without a deploy form',
        f'{DEPLOY} {{teacher}} {{teacher.pth}} {{new}}/a.pth',
        'has no backbone with a deploy form, such as SPViT; its backbone is '
        'ResNet_CIFAR.',
    ),
    Case(
        'a checkpoint of another model',
        f'{SHOW_PRIORS} {{priors}} {{plain.pth}} --out {{new}}/a.png',
        'is not a checkpoint of this model.',
    ),
    Case(
        'a checkpoint that is not there',
        f'{ATTENTION} {{priors}} nowhere.pth --query 1 1',
        'The checkpoint nowhere.pth does not exist (seen from ',
    ),
    Case(
        'a folder as a checkpoint',
        f'{RELEVANCE} {{priors}} {{images}} --out {{new}}/a.png',
        'is a folder. Give a file; it holds no .pth file.',
    ),
    Case(
        'a checkpoint of one model for two',
        f'{SHOW_PRIORS} {{priors}} {{priors.pth}} {{priors.pth}} --compare {{plain}} '
        '{plain.pth}',
        '--compare takes one checkpoint of each model, not a strip.',
    ),
    Case(
        'a model without attention to show',
        f'{ATTENTION} {{teacher}} {{teacher.pth}} --query 1 1 --out-dir {{new}}',
        'ImageClassifier has no attention to record',
    ),
    Case(
        'a study that there is not',
        f'{STUDY} realtive',
        "No study 'realtive'. There are: prior, layers",
    ),
    Case('no study', f'{STUDY}', 'Name a study, or --list them.'),
    Case(
        'a setting that the study does not have',
        f'{STUDY} prior --settings psa --work-dir {{new}}',
        '--settings: no setting psa. There are: none, sp-sa.',
    ),
    Case(
        'a study of a model without SPViT',
        f'{STUDY} prior --config {{teacher}} --work-dir {{new}}',
        'the studies change the priors of an SPViT, and `model.backbone` is a '
        'ResNet_CIFAR.',
    ),
    Case(
        'a study of a segmentor',
        f'{STUDY} prior --config {{scenes}} --work-dir {{new}}',
        'is a config of mmseg; the studies compare accuracies of image classifiers.',
    ),
    Case(
        'a study of a config without a model',
        f'{STUDY} prior --config {{no_model.py}} --work-dir {{new}}',
        'no_model.py lacks model, train_dataloader, val_dataloader, val_evaluator, '
        'train_cfg, optim_wrapper.',
    ),
    Case(
        'a record of something else',
        f'{STUDY} prior --record {{syntax.py}} --work-dir {{new}}',
        'syntax.py, line 1: no record of results.',
    ),
    Case(
        'an empty name of a picture to write',
        f"{SHOW_PRIORS} {{priors}} {{junk.pth}} --out ''",
        'The name of the file to write is empty.',
    ),
    Case(
        'an empty name of a folder',
        f"{ATTENTION} {{priors}} {{junk.pth}} --query 1 1 --out-dir ''",
        'The name of the folder to write to is empty.',
    ),
    Case(
        'an empty name of the folder of label maps',
        f"{LABELS} {{teacher}} {{junk.pth}} {{images}} ''",
        'The name of the folder to write to is empty.',
    ),
    Case(
        'an empty name of a record',
        f"{STUDY} prior --record ''",
        'The name of the file to write is empty.',
    ),
    Case(
        'a folder where a file is meant',
        f'{BINARIZE} {{priors}} {{junk.pth}} --out {{images}}',
        'is a folder. Give the name of a file to write.',
    ),
    Case(
        'a file where a folder is meant',
        f'{ATTENTION} {{priors}} {{junk.pth}} --query 1 1 --out-dir {{picture.png}}',
        'is not a folder.',
    ),
    Case(
        'a file where the folder of the studies is meant',
        f'{STUDY} prior --work-dir {{picture.png}}',
        'is not a folder.',
    ),
    Case(
        'an ending that is no picture',
        f'{RELEVANCE} {{priors}} {{junk.pth}} --out {{new}}/a.csv',
        'must end in .png.',
    ),
    Case(
        'a file that is there, without --force',
        f'{DEPLOY} {{priors}} {{junk.pth}} {{nan.pth}}',
        'exists. Give another name, or --force to replace the file.',
    ),
    Case(
        'a folder that nobody can write to',
        f'{SEGMENTATION} {{scenes}} {{junk.pth}} --out /proc/a.png',
        'Nothing can be written to the folder /proc: No such file or directory.',
    ),
    Case(
        'a disk that is full when the picture is written',
        f'{SHOW_PRIORS} {{priors}} {{priors.pth}} --out {{full}}/a.png',
        'a.png cannot be written: the disk is full: No space left on device.',
    ),
    Case(
        'a disk that is full when a checkpoint is written',
        f'{DEPLOY} {{priors}} {{priors.pth}} {{full}}/a.pth',
        'a.pth cannot be written: the disk is full: No space left on device.',
    ),
]


# What each command writes, and nothing of what it reads but names.
WRITERS = {
    SHOW_PRIORS: '{priors} {junk.pth} --out {out}.png',
    ATTENTION: '{priors} {junk.pth} --query 1 1 --out-dir {out}',
    RELEVANCE: '{priors} {junk.pth} --out {out}.png',
    SEGMENTATION: '{scenes} {junk.pth} --out {out}.png',
    BINARIZE: '{priors} {junk.pth} --out {out}.png',
    LABELS: '{teacher} {junk.pth} {images} {out}',
    DEPLOY: '{priors} {junk.pth} {out}.pth',
    STUDY: 'prior --config {junk.pth} --work-dir {out}',
    f'{STUDY} prior': '--config {junk.pth} --record {out}',
    'benchmarks/resolution.py digits': '--cfg-options model=1 --out {out}',
    'benchmarks/digits_token_labeling.py': '--work-dir {out}',
    'benchmarks/draw_studies.py': '--out-dir {out}',
    'benchmarks/speed.py': '--out-dir {out}',
}


def save(path, config, change=None):
    """A checkpoint of a new model, one of its tensors changed."""
    state = build_model(load_config(str(config))).state_dict()
    if change is not None:
        name, value = change
        state[name].view(-1)[0] = value
    torch.save({'state_dict': state}, path)


def write_child(path, config, line):
    path.write_text(f"_base_ = '{config}'\n{line}\n")


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """What the commands name: good files, and bad ones."""
    folder = tmp_path_factory.mktemp('files')
    names = dict(priors=PRIORS, plain=PLAIN, scenes=SCENES, teacher=TEACHER)
    for name, config in list(names.items()):
        save(folder / f'{name}.pth', config)
    (folder / 'junk.pth').write_text('no checkpoint')
    # A disk that is full, for the files of these names, once.
    (folder / 'full').mkdir()
    for name in ('a.png', 'a.pth'):
        partial = folder / f'full/.{os.getpid()}.partial.{name}'
        partial.symlink_to('/dev/full')
    qkv, w1 = 'backbone.layers.1.attn.qkv.weight', 'backbone.layers.0.attn.prior.w1'
    save(folder / 'nan.pth', PRIORS, (qkv, float('nan')))
    save(folder / 'huge.pth', PRIORS, (w1, 1e38))
    save(folder / 'teacher_nan.pth', TEACHER, ('backbone.conv1.weight', float('nan')))

    std = 'data_preprocessor=dict(std=[0.0, 0.0, 0.0])'
    write_child(folder / 'zero_std.py', PRIORS, std)
    write_child(folder / 'zero_std_scenes.py', SCENES, f'model=dict({std})')

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    picture.save(folder / 'picture.png')
    picture.crop((0, 0, 3, 2)).save(folder / 'tiny.png')
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'cut.png').write_bytes((folder / 'picture.png').read_bytes()[:600])
    (folder / 'broken.png').symlink_to('nowhere.png')
    (folder / 'syntax.py').write_text('model = = 3\n')
    (folder / 'no_model.py').write_text('work_dir = None\n')
    pipeline = "dict(pipeline=[dict(type='PackInputs')])"
    line = f'test_dataloader = dict(dataset={pipeline})'
    write_child(folder / 'any_size.py', PRIORS, line)
    write_child(folder / 'no_test.py', PRIORS, 'test_dataloader = None')
    for digit in range(10):
        (folder / 'images' / str(digit)).mkdir(parents=True)
        picture.save(folder / f'images/{digit}/0.png')
    shutil.copytree(folder / 'images', folder / 'images_one_bad')
    (folder / 'images_one_bad/9/bad.png').write_text('no image')
    (folder / 'labels').mkdir()
    return {**{p.name: p for p in folder.iterdir()}, **names, 'new': folder / 'new'}


def run(command, files):
    """Run a command in this process; names that are there twice are loaded once."""
    path, *argv = command.split()
    path = ROOT / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Names with dots are no fields of str.format.
    for name in sorted(files, key=len, reverse=True):
        argv = [word.replace(f'{{{name}}}', str(files[name])) for word in argv]
    run_cli(module.main, path.name, ['' if word == "''" else word for word in argv])


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))


@pytest.mark.parametrize('case', CASES, ids=[case.kind for case in CASES])
def test_bad_input(case, files, capsys, benchmarks):
    with pytest.raises(SystemExit) as end:
        run(case.command, files)
    assert end.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if ': error: ' in x]
    assert case.says in line
    assert not files['new'].exists(), 'nothing is left behind'


KINDS = {
    **{'RGB.png': 'RGB', 'grey.png': 'L', 'palette.png': 'P', 'RGBA.png': 'RGBA'},
    **{'CMYK.jpg': 'CMYK', 'a.bmp': 'RGB', 'a.webp': 'RGB', 'a.tif': 'RGB'},
}


@pytest.mark.parametrize('config', ['priors', 'scenes'])
def test_pictures_are_read_as_in_training(config, files, tmp_path):
    rgb = Image.open(files['picture.png'])
    for name, mode in KINDS.items():
        rgb.convert(mode).save(tmp_path / name)
    cv2.imwrite(str(tmp_path / '16-bit.png'), np.asarray(rgb).astype(np.uint16) * 257)
    paths = [str(tmp_path / name) for name in (*KINDS, '16-bit.png')]
    cfg, model = load_model(str(files[config]), str(files[f'{config}.pth']))
    samples = load_samples(cfg, model, paths)
    for path, sample in zip(paths, samples, strict=True):
        expected = mmcv.imread(path, channel_order='rgb')
        assert expected.std() > 1
        np.testing.assert_array_equal(sample.picture, expected, err_msg=path)


@pytest.mark.parametrize('command', WRITERS)
@pytest.mark.parametrize('where', ['/proc/x', '{junk.pth}/x'])
def test_outputs_are_tried_first(command, where, files, capsys, benchmarks):
    files = {**files, 'out': where.replace('{junk.pth}', str(files['junk.pth']))}
    with pytest.raises(SystemExit) as end:
        run(f'{command} {WRITERS[command]}', files)
    assert end.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if ': error: ' in x]
    assert 'be written to' in line


@pytest.mark.parametrize(
    'write',
    [
        lambda path: write_csv(path, [['a', 'b'], [1, 2]]),
        lambda path: save_figure(new_figure(1, 1), path, dpi=50),
        lambda path: write_gif([np.zeros((9, 9, 3), np.uint8)] * 2, path),
        lambda path: write_label_map(path, torch.zeros(2, 1, 1, 1), 3),
    ],
    ids=['csv', 'png', 'gif', 'pt'],
)
def test_a_full_disk_leaves_the_old_file(write, tmp_path):
    path = tmp_path / 'a.png'
    path.write_text('old')
    (tmp_path / f'.{os.getpid()}.partial.a.png').symlink_to('/dev/full')
    # torch 2.1 does not say so itself; the map is not there when it is read back.
    told = 'a.png cannot be written: the disk is full|partial.a.png` does not exist'
    with pytest.raises(UserError, match=told):
        write(str(path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a.png', 'old')]


@pytest.mark.parametrize(
    ('command', 'end'),
    [
        (f'{RELEVANCE} {{priors}} {{priors.pth}} --count 2 --out {{done}}.png', '2/2'),
        (f'{SEGMENTATION} {{scenes}} {{scenes.pth}} --number 2 --out {{done}}.png', '2/2'),
        (f'{BINARIZE} {{priors}} {{priors.pth}} --mass-batches 1 --keep 1 --out {{done}}'
         '.png', '2/2'),
    ],
)  # fmt: skip
def test_long_loops_say_how_far_they_are(command, end, files, tmp_path, capsys):
    run(command, {**files, 'done': tmp_path / 'done'})
    assert f'{end}, ' in capsys.readouterr().err
    assert (tmp_path / 'done.png').exists()


def test_a_picture_that_is_too_large_is_told(tmp_path):
    with pytest.raises(UserError, match='a.png would be 100 x 70000 pixels'):
        save_figure(new_figure(1, 700), str(tmp_path / 'a.png'), dpi=100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['quickstart', 'demo_segmentation'])
def test_a_script_without_options_starts_no_training_for_them(name, tmp_path):
    script = ROOT / f'tools/{name}.sh'
    done = subprocess.run(
        [str(script), '--help'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith('Usage: [WORK_DIR=')


def test_the_table_is_the_cases():
    text = (ROOT / 'docs/reliability.md').read_text()
    section = text.partition('### Other commands')[2].partition('\n#')[0]
    rows = [x for x in section.splitlines() if x.startswith('|')][2:]
    expected = [f'| {case.kind} | {case.says} |' for case in CASES]
    assert rows == expected, 'The table should be:\n' + '\n'.join(expected)
