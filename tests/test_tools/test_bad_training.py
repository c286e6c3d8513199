"""What training and testing say of bad input, each kind a line of docs/reliability.md."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

from spvit_mm.datasets.token_labels import write_label_map
from tests.test_engine import test_seg_data
from tests.test_engine.tiny import make_data, make_images, write_config
from tests.test_tools.test_train_test import ROOT, TOOLS, command, fails

DOCS = ROOT / 'docs' / 'reliability.md'


class Project:
    """A folder with data, masks, configs and a checkpoint, for one case to spoil."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.opened = []
        make_data(root / 'data')
        config = write_config(root / 'vit.py', root / 'data', length=2)
        text = config.read_text().replace(
            "type='VisionTransformer'", "type='SPViT', num_spsa_layers=1"
        )
        (root / 'c.py').write_text(text)

    def weights(self, name: str = 'c.py') -> dict:
        model = MODELS.build(Config.fromfile(self.root / name).model)
        return model.state_dict()

    def save(self, state_dict: dict) -> None:
        torch.save(dict(state_dict=state_dict), self.root / 'weights.pth')

    def segmentation(self, values: tuple, dtype=np.uint8) -> None:
        """Images and their masks of these values, by halves."""
        rng = np.random.default_rng(0)
        for i in range(4):
            image = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
            mmcv.imwrite(image, str(self.root / f'data/images/{i}.png'))
            mask = np.array(values, dtype)[np.arange(48) * len(values) // 48]
            mask = np.broadcast_to(mask, (32, 48))
            mmcv.imwrite(mask.copy(), str(self.root / f'data/masks/{i}.png'))
        test_seg_data.write(self.root)


class Case(NamedTuple):
    what: str  # is wrong
    says: str
    options: str = ''  # --cfg-options, {root} being the folder of the project
    arguments: str = ''
    prepare: Optional[Callable] = None  # spoils the project
    tool: str = 'train.py c.py'
    environment: dict = {}  # noqa: RUF012
    stops: bool = True


BACKBONE = 'model.backbone'
TRAIN = 'train_dataloader.dataset'
TEST = 'test.py c.py weights.pth'
LABEL = 'dataset_converters/generate_token_labels.py c.py weights.pth'
SEG = 'train.py seg.py'


def good_weights(project):
    project.save(project.weights())


def nan_weights(project):
    state_dict = project.weights()
    state_dict['backbone.layers.0.attn.prior.w1'][0] = float('nan')
    project.save(state_dict)


def huge_weights(project):
    state_dict = project.weights()
    state_dict['head.layers.head.weight'].fill_(3e38)
    project.save(state_dict)


def foreign_weights(project):
    project.save({'conv.weight': torch.zeros(3)})


def partial_weights(project):
    state_dict = project.weights()
    del state_dict['head.layers.head.bias']
    project.save(state_dict)


def nan_image(project):
    image = np.full((20, 24, 3), np.nan, np.float32)
    path = project.root / 'data/train/a/0.tif'
    assert cv2.imwrite(str(path), image)


def corrupt(name):
    def prepare(project):
        (project.root / name).write_bytes(b'no image')

    return prepare


def corrupt_validation(project):
    corrupt('data/val/a/0.png')(project)
    # As in configs of classification, which leave test_mode at False.
    config = project.root / 'c.py'
    config.write_text(config.read_text().replace(', test_mode=True', ''))


def other_files(project):
    folder = project.root / 'data/train/a'
    image = mmcv.imread(str(folder / '0.png'))
    mmcv.imwrite(image, str(folder / 'x.webp'))
    mmcv.imwrite(image, str(folder / 'y.webp'))
    (folder / 'x.gif').write_bytes(b'GIF89a')
    (folder / 'z.png').symlink_to('/nowhere/z.png')


def classes(name, folders, images=1):
    def prepare(project):
        make_images(project.root / name, folders, images)

    return prepare


def empty_folder(project):
    (project.root / 'empty').mkdir()


def label_maps(project):
    for path in (project.root / 'data/train').glob('*/*.png'):
        name = f'{path.parent.name}/{path.stem}.pt'
        label_map = torch.stack((torch.ones(1, 2, 2), torch.full((1, 2, 2), 4.0)))
        write_label_map(str(project.root / 'maps' / name), label_map, 5)
    with open(project.root / 'c.py', 'a') as config:
        config.write(
            "train_dataloader['dataset'] = dict(type='TokenLabelDataset', "
            "dataset=dict(type='CustomDataset', data_prefix="
            f'{str(project.root / "data/train")!r}), num_classes=5, '
            f'label_root={str(project.root / "maps")!r}, pipeline=[train_pipeline[0], '
            "dict(type='TokenLabelRandomResizedCrop', scale=16), "
            "dict(type='PackTokenLabelInputs')])\n"
        )


def masks(*values, dtype=np.uint8):
    return lambda project: project.segmentation(values, dtype)


def one_mask(mask):
    def prepare(project):
        project.segmentation((0, 1))
        path = project.root / 'data/masks/2.png'
        path.unlink()
        if mask is not None:
            mmcv.imwrite(mask, str(path))

    return prepare


def a_file(name):
    return lambda project: (project.root / name).touch()


def no_gpu(project):
    project.monkeypatch.setattr('spvit_mm.apis.runner.get_device', lambda: 'cpu')


def one_gpu(project):
    project.monkeypatch.setattr('spvit_mm.apis.runner.get_device', lambda: 'cuda')
    project.monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)


def port_in_use(project):
    server = socket.socket()
    server.bind(('', 0))
    server.listen()
    project.opened.append(server)
    project.monkeypatch.setenv('PORT', str(server.getsockname()[1]))


AUXILIARY = (
    'model.auxiliary_head.type=FCNHead model.auxiliary_head.in_channels=16 '
    'model.auxiliary_head.channels=8 model.auxiliary_head.num_convs=1 '
    'model.auxiliary_head.in_index=0 model.auxiliary_head.num_classes=5'
)
CASES = [
    # numbers that are none
    Case(
        'a training that diverges',
        'is not finite (loss nan). The images of the batch are finite; the first weight '
        'that is not, after this step, is backbone.cls_token.',
        'optim_wrapper.optimizer.lr=1e30',
    ),
    Case(
        'an argument that makes the loss nan',
        'The loss of iteration 1 is not finite',
        f'{BACKBONE}.attn_cfg.combine=add {BACKBONE}.attn_cfg.strength=inf '
        f'{BACKBONE}.prior.type=MLPSpatialPrior {BACKBONE}.prior.init=local',
    ),
    Case(
        'a checkpoint with nan, trained from',
        'backbone.layers.0.attn.prior.w1 holds nan or infinity before the first step.',
        'load_from={root}/weights.pth',
        prepare=nan_weights,
    ),
    Case(
        'a checkpoint with nan, tested',
        'backbone.layers.0.attn.prior.w1 holds nan or infinity before the first step.',
        prepare=nan_weights,
        tool=TEST,
    ),
    Case(
        'scores that overflow, of finite weights',
        'data/val/a/0.png hold nan or infinity, and the weights do not',
        prepare=huge_weights,
        tool=TEST,
    ),
    Case(
        'an image with nan',
        'data/train/a/0.tif holds nan or infinity. Replace it.',
        f'{TRAIN}.pipeline.0.color_type=unchanged',
        prepare=nan_image,
    ),
    Case(
        'nan in a config',
        '`optim_wrapper.optimizer.lr` is nan, which is no number to compute with.',
        'optim_wrapper.optimizer.lr=nan',
    ),
    Case(
        'a deviation of 0 to divide images by',
        '`data_preprocessor.std` is [0, 0, 0]: images are divided by it',
        'data_preprocessor.std=[0,0,0]',
    ),
    # the model
    Case(
        'a text where True or False is meant',
        "`model.backbone.freeze_all_but_priors` is the text 'no', which counts as true",
        f'{BACKBONE}.freeze_all_but_priors=no',
    ),
    Case(
        'another text where True or False is meant',
        "`with_cp` must be True or False, got 'never'.",
        f'{BACKBONE}.with_cp=never',
    ),
    Case(
        'a deploy form that is trained',
        'model.backbone.deploy=True is for testing: its priors are constants',
        f'{BACKBONE}.deploy=True',
    ),
    Case(
        'a backbone frozen but for priors that it has none of',
        '`freeze_all_but_priors` would freeze everything',
        f'{BACKBONE}.freeze_all_but_priors=True {BACKBONE}.num_spsa_layers=0',
    ),
    Case(
        'an FFN without a unit',
        '`feedforward_channels` must be an integer of 1 or more, got 0.',
        f'{BACKBONE}.arch.feedforward_channels=0',
    ),
    Case(
        'a number of layers that is none',
        "`num_layers` must be an integer of 0 or more, got 'x'.",
        f'{BACKBONE}.arch.num_layers=x',
    ),
    Case(
        'heads that do not divide the width',
        '`embed_dims` must be divisible by `num_heads`',
        f'{BACKBONE}.arch.num_heads=3',
    ),
    Case(
        'no layer to return',
        '`out_indices` must name at least one layer, got none.',
        f'{BACKBONE}.out_indices=[]',
    ),
    Case(
        'a training size smaller than a patch',
        '`img_size` must hold at least one patch, got (4, 4) and patch_size=(8, 8).',
        f'{BACKBONE}.img_size=4',
    ),
    Case(
        'a mistyped prior',
        "`prior` names the type 'MLPPrior', which is not registered.",
        f'{BACKBONE}.prior.type=MLPPrior',
    ),
    Case(
        'a head of another width',
        'model.head.in_channels is 17, and the backbone gives features of embed_dims=16.',
        'model.head.in_channels=17',
    ),
    # the config
    Case('a config that is not there', 'cannot be read', tool='train.py none.py'),
    Case(
        'a mistyped entry of the config',
        'The config has the entry `train_cgf`, which nothing reads. Is it `train_cfg`?',
        'train_cgf.max_epochs=1',
    ),
    Case(
        'an option that is no pair',
        '--cfg-options takes key=value pairs',
        'train_cfg',
    ),
    Case(
        'a number of epochs that is none',
        "`train_cfg.max_epochs` must be a whole number of 1 or more, got 'abc'.",
        f'train_cfg.max_epochs=abc {TRAIN}.data_prefix=/nowhere',
    ),
    Case(
        'no epoch',
        '`train_cfg.max_epochs` must be a whole number of 1 or more, got 0.',
        'train_cfg.max_epochs=0',
    ),
    Case(
        'a validation every 0 epochs',
        '`train_cfg.val_interval` must be a whole number of 1 or more, got 0.',
        'train_cfg.val_interval=0',
    ),
    Case(
        'a checkpoint every "few" epochs',
        '`default_hooks.checkpoint.interval` must be a whole number of -1 or more',
        'default_hooks.checkpoint.interval=few',
    ),
    Case(
        'the best 50 of 3 classes',
        '`val_evaluator.topk` is 50, and the head tells num_classes=3 classes apart',
        'val_evaluator.topk=50',
    ),
    Case(
        'the best 5 of 3 classes, in training',
        '`model.head.topk` is (1, 5), and the head tells num_classes=3 classes apart',
        'model.head.topk=(1,5) model.head.cal_acc=True',
    ),
    Case(
        'the best 5 of 3 classes, in testing',
        '`test_evaluator.topk` is (1, 5), and the head tells num_classes=3 classes apart',
        'test_evaluator.topk=(1,5)',
        prepare=good_weights,
        tool=TEST,
    ),
    Case(
        'mixed labels of another length than the scores',
        '`data_preprocessor.num_classes` is 5 and `model.head.num_classes` is 3',
        'data_preprocessor.num_classes=5 model.train_cfg.augments.type=Mixup '
        'model.train_cfg.augments.alpha=1.0',
    ),
    Case(
        'a mistyped transform',
        "is 'RandomResizeCrop', which is no registered transform. Is it "
        "'RandomResizedCrop'?",
        f'{TRAIN}.pipeline.1.type=RandomResizeCrop {TRAIN}.data_prefix=/nowhere',
    ),
    Case(
        'a mistyped transform of the validation',
        "`val_dataloader.dataset.pipeline.1.type` is 'Resise', which is no registered",
        f'val_dataloader.dataset.pipeline.1.type=Resise {TRAIN}.data_prefix=/nowhere',
    ),
    Case(
        'a mistyped optimizer',
        "`optim_wrapper.optimizer.type` is 'AdamX', which is no registered optimizer.",
        'optim_wrapper.optimizer.type=AdamX',
    ),
    Case(
        'a mistyped metric',
        "`val_evaluator.type` is 'Acuracy', which is no registered metric. Is it "
        "'Accuracy'?",
        'val_evaluator.type=Acuracy',
    ),
    Case(
        'a negative learning rate',
        'optim_wrapper of',
        'optim_wrapper.optimizer.lr=-1',
    ),
    Case(
        'a schedule that ends before it begins',
        'param_scheduler of',
        'param_scheduler.begin=9 param_scheduler.end=5',
    ),
    # where it runs, and where it writes
    Case('a work dir without a name', '--work-dir', arguments="--work-dir=''"),
    Case(
        'a work dir that is a file',
        'taken is not a folder.',
        arguments='--work-dir {root}/taken',
        prepare=a_file('taken'),
    ),
    Case(
        'a work dir that nobody can write to',
        'Nothing can be written to the folder /proc/spvit_mm: ',
        arguments='--work-dir /proc/spvit_mm',
    ),
    Case(
        'a launcher that started nothing',
        '--launcher pytorch is for processes that it has started: RANK is not set.',
        arguments='--launcher pytorch',
    ),
    Case(
        'Slurm as the launcher, outside of Slurm',
        '--launcher slurm is for processes that it has started: SLURM_PROCID is not set.',
        arguments='--launcher slurm',
    ),
    Case(
        'Slurm as the launcher, without a GPU',
        '--launcher slurm needs GPUs, and torch sees none here.',
        arguments='--launcher slurm',
        prepare=no_gpu,
        environment={'SLURM_PROCID': '0'},
    ),
    Case(
        'more processes than GPUs',
        'There are more processes than the 1 GPUs that torch sees here: this is number 3',
        arguments='--launcher pytorch',
        prepare=one_gpu,
        environment={'RANK': '3', 'LOCAL_RANK': '3'},
    ),
    Case(
        'a number of processes that is none',
        "GPUS must be a whole number of 1 or more, got 'two'.",
        tool='dist_train.sh c.py two',
    ),
    Case(
        'a port that is no number',
        "PORT must be a whole number of 1 or more, got 'abc'.",
        tool='dist_test.sh c.py weights.pth 2',
        environment={'PORT': 'abc'},
    ),
    Case(
        'a port in use',
        'cannot be used: Address already in use. Choose another: PORT=29501',
        prepare=port_in_use,
        tool='dist_train.sh c.py 2',
    ),
    Case(
        'a port beyond the last',
        'the port 70000 cannot be used: the last is 65535. Choose another:',
        tool='dist_train.sh c.py 2',
        environment={'PORT': '70000'},
    ),
    Case(
        'a number of CPUs that is none, for Slurm',
        "CPUS_PER_TASK must be a whole number of 1 or more, got 'all'.",
        tool='slurm_train.sh partition job c.py work',
        environment={'CPUS_PER_TASK': 'all'},
    ),
    # images
    Case(
        'a folder that is not there',
        'No such file or directory',
        f'{TRAIN}.data_prefix=/nowhere',
    ),
    Case(
        'a folder without images',
        'Found 0 files in subfolders of',
        f'{TRAIN}.data_prefix={{root}}/empty',
        prepare=empty_folder,
    ),
    Case(
        'images of one class',
        'are of one class; a classifier needs at least two',
        f'{TRAIN}.data_prefix={{root}}/one',
        prepare=classes('one', ['a']),
    ),
    Case(
        'more classes than the head has',
        'has labels up to 3 and the head of the model has num_classes=3 (labels from 0',
        f'{TRAIN}.data_prefix={{root}}/four',
        prepare=classes('four', 'abcd'),
    ),
    Case(
        'classes numbered differently in validation',
        "only in training: ['d']; only in validation: ['c']",
        f'{TRAIN}.data_prefix={{root}}/other',
        prepare=classes('other', 'abd'),
    ),
    Case(
        'files that no data set reads',
        'files of its folders: 2 .webp, 1 .gif, 1 broken links, such as',
        'train_cfg.max_epochs=1',
        arguments='--no-validate',
        prepare=other_files,
        stops=False,
    ),
    Case(
        'an image that cannot be read',
        'data/train/a/1.png (8 bytes) cannot be read:',
        prepare=corrupt('data/train/a/1.png'),
    ),
    Case(
        'an image of the validation that cannot be read, others left out',
        'data/val/a/0.png (8 bytes) cannot be read:',
        'train_cfg.max_epochs=1',
        arguments='--skip-corrupt-images',
        prepare=corrupt_validation,
    ),
    Case(
        'an image smaller than a patch',
        'comes out of the pipeline with 4 x 4 pixels (h x w), smaller than one patch of '
        'the backbone, 8 x 8.',
        f'{TRAIN}.pipeline.1.scale=4',
    ),
    Case(
        'less data than a batch',
        'the training data makes no batch of 64',
        'train_dataloader.batch_size=64 train_dataloader.drop_last=True',
    ),
    # token labeling
    Case(
        'label maps of more classes than the head has',
        'is of 5 classes and the head of the model of num_classes=3.',
        prepare=label_maps,
    ),
    Case(
        'a teacher whose weights are those of another model',
        'is not a checkpoint of this model. 0 of the',
        prepare=foreign_weights,
        tool=f'{LABEL} data/train maps',
    ),
    Case(
        'a teacher with nan in its weights',
        'weights.pth holds nan or infinity, first in backbone.layers.0.attn.prior.w1',
        prepare=nan_weights,
        tool=f'{LABEL} data/train maps',
    ),
    Case(
        'a teacher of another number of classes',
        'The teacher knows 3 classes, but',
        prepare=lambda project: (good_weights(project), classes('n', 'abcd')(project)),
        tool=f'{LABEL} n maps',
    ),
    Case(
        'a teacher that sees less than a patch',
        '`size` must hold one patch of the teacher, 8 x 8 pixels, got 4.',
        arguments='--size 4',
        prepare=good_weights,
        tool=f'{LABEL} data/train maps',
    ),
    Case(
        'a GPU that is not there',
        "There is no device 'cuda:99': torch sees",
        arguments='--device cuda:99',
        prepare=good_weights,
        tool=f'{LABEL} data/train maps',
    ),
    # segmentation
    Case(
        'masks of 0 and 255',
        'hold the values 0 and 255 alone, where 255 is ignored: there is nothing to tell '
        'apart.',
        prepare=masks(0, 255),
        tool=SEG,
    ),
    Case(
        'masks of 255 alone',
        'hold the value 255 alone, where 255 is ignored: there is nothing to tell apart.',
        prepare=masks(255),
        tool=SEG,
    ),
    Case(
        'masks of 16 bits with large values',
        'holds the values [300], and the head has num_classes=2 (values from 0 to 1',
        prepare=masks(0, 300, dtype=np.uint16),
        tool=SEG,
    ),
    Case(
        'masks of 16 bits whose lower 8 bits are a class',
        'holds the values [256], and the head has num_classes=2 (values from 0 to 1',
        prepare=masks(0, 1, 256, dtype=np.uint16),
        tool=SEG,
    ),
    Case(
        'a mask of more classes than the head has',
        'data/masks/2.png holds the values [7], and the head has num_classes=2',
        prepare=one_mask(np.full((32, 48), 7, np.uint8)),
        tool=SEG,
    ),
    Case(
        'a mask of another size than its image',
        'data/masks/2.png is 32 x 40 (h x w) and its image',
        prepare=one_mask(np.zeros((32, 40), np.uint8)),
        tool=SEG,
    ),
    Case(
        'a mask of colours',
        'data/masks/2.png has the shape (32, 48, 3). A mask has one channel',
        prepare=one_mask(np.zeros((32, 48, 3), np.uint8)),
        tool=SEG,
    ),
    Case(
        'an image without its mask',
        '1 of 4 masks of the training data do not exist',
        prepare=one_mask(None),
        tool=SEG,
    ),
    Case(
        'a crop smaller than a patch',
        'is 4 x 48 pixels, smaller than one patch of the backbone, 8 x 8.',
        f'{TRAIN}.pipeline.2.crop_size=(4,48)',
        prepare=masks(0, 1),
        tool=SEG,
    ),
    Case(
        'no image with the ending that the config names',
        'The training data holds no images: ',
        f'{TRAIN}.img_suffix=.jpg',
        prepare=masks(0, 1),
        tool=SEG,
    ),
    Case(
        'a head of more classes than the data',
        'is of 2 classes and the head of the model of num_classes=3.',
        'model.decode_head.num_classes=3',
        prepare=masks(0, 1),
        tool=SEG,
    ),
    Case(
        'heads of different classes',
        'model.decode_head.num_classes=2, model.auxiliary_head.num_classes=5.',
        AUXILIARY,
        prepare=masks(0, 1),
        tool=SEG,
    ),
    # testing
    Case(
        'a checkpoint that is not there',
        'weights.pth does not exist',
        tool=TEST,
    ),
    Case(
        'a checkpoint of another model',
        'The checkpoint is not one of this model. 0 of the',
        prepare=foreign_weights,
        tool=TEST,
    ),
    Case(
        'a checkpoint that fits in part',
        'The checkpoint fits this model only in part.',
        prepare=partial_weights,
        tool=TEST,
    ),
    Case(
        'results where nobody can write',
        'Nothing can be written to the folder /proc: ',
        arguments='--out /proc/p.pkl',
        prepare=good_weights,
        tool=TEST,
    ),
    Case(
        'pictures where nobody can write',
        'Nothing can be written to the folder /proc/p: ',
        arguments='--show-dir /proc/p',
        prepare=good_weights,
        tool=TEST,
    ),
    Case(
        'results of an unknown format',
        'p.txt must end in .pkl or .pickle.',
        arguments='--out p.txt',
        prepare=good_weights,
        tool=TEST,
    ),
]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.what)
def test_bad_input(case, tmp_path, monkeypatch, capsys, mmpretrain_scope):
    tool, *arguments = case.tool.split()
    if 'seg.py' in arguments:
        pytest.importorskip('mmseg.models')
    project = Project(tmp_path, monkeypatch)
    for name in ('RANK', 'LOCAL_RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    if case.prepare is not None:
        case.prepare(project)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    words = case.arguments.format(root=tmp_path).replace("''", '').split()
    if not tool.startswith('dataset') and '--work-dir' not in case.arguments:
        words += ['--work-dir', 'work']
    if case.options:
        words += ['--cfg-options', *case.options.format(root=tmp_path).split()]
    if tool.endswith('.sh'):
        monkeypatch.setenv(
            'PATH', f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
        )
        done = subprocess.run(
            [str(TOOLS / tool), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert case.says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    elif case.stops:
        assert case.says in fails(capsys, tool, *arguments, *words)
    else:
        command(tool, *arguments, *words)
        assert case.says in capsys.readouterr().out
    for server in project.opened:
        server.close()
    # Before the work, or at the first sign.
    assert not list(tmp_path.glob('work/epoch_2.pth'))


def table() -> str:
    """The table of the docs; print it with python -m tests.test_tools.test_bad_training."""
    rows = [f'| {case.what} | {case.says.strip()} |' for case in CASES]
    return '\n'.join(
        ['| what is wrong | what the command says |', '| --- | --- |', *rows]
    )


def test_docs_list_the_same():
    text = DOCS.read_text().split('### Training and testing', 1)[1]
    lines = text.split('\n#', 1)[0].splitlines()
    assert [line for line in lines if line.startswith('|')] == table().splitlines()


if __name__ == '__main__':
    print(table())
