"""Every config is what its name and the paper say; classifiers train a step."""

import re
from math import inf

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.visualization import Visualizer
from mmpretrain.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS
from PIL import Image

from spvit_mm.apis import test, train
from spvit_mm.apis.config_checks import check_config
from spvit_mm.apis.schedule import shorten_schedulers
from spvit_mm.datasets.subset import EXTENSIONS

from .small import PATHS, ROOT, names, read, shrink

CLASSIFIERS = [*names('classification'), *names('token_labeling')]
NAME = re.compile(
    r'.+_(?P<gpus>\d+)xb(?P<batch>\d+)(-tokenlabel)?(-ft)?'
    r'(-(?P<length>\d+)(?P<unit>[eik]))?_(?P<data>[^_]+)'
)
# Classes, and height and width of the images.
DATA = {
    'in1k': (1000, 224, 224),
    'in1k-384px': (1000, 384, 384),
    'in100': (100, 224, 224),
    'custom': (2, 224, 224),
    'cifar10': (10, 32, 32),
    'cifar10-5k': (10, 32, 32),
    'cifar10-5k-val': (10, 32, 32),
    'cifar10-20k': (10, 32, 32),
    'cifar10-20k-val': (10, 32, 32),
    'imagenette-64px': (10, 64, 64),
    'cifar100': (100, 32, 32),
    'digits': (10, 24, 24),
    'digits-prior-maps': (10, 24, 24),
    'ade20k-512x512': (150, 512, 512),
    'cityscapes-512x1024': (19, 512, 1024),
    'voc12aug-512x512': (21, 512, 512),
    'folder-512x512': (2, 512, 512),
    'folder-64x96': (2, 64, 96),
    'digit-scenes-64x96': (11, 64, 96),
}


@pytest.mark.parametrize('name', PATHS)
def test_a_config_is_what_its_name_says(name):
    cfg, said = read(name), NAME.fullmatch(name)
    classes, height, width = DATA[said['data']]
    assert cfg.train_dataloader.batch_size == int(said['batch'])
    length = int(said['length'] or 300)
    if said['unit'] in ('i', 'k'):
        assert cfg.train_cfg.max_iters == length * (1000 if said['unit'] == 'k' else 1)
    elif re.match('spvit-(small|medium|large)', name) and length == 300:
        assert cfg.train_cfg.max_epochs == 300 + 10  # of cool-down
    else:
        assert cfg.train_cfg.max_epochs == length
    if name in names('segmentation'):
        heads = [cfg.model.decode_head, cfg.model.get('auxiliary_head')]
        assert {head.num_classes for head in heads if head} == {classes}
        assert tuple(cfg.model.data_preprocessor.size) == (height, width)
        assert tuple(cfg.model.backbone.img_size) == (height, width)
    else:
        assert cfg.model.head.num_classes == classes
        assert cfg.data_preprocessor.num_classes == classes
        assert cfg.model.backbone.get('img_size', height) == height
    # It opens every log.
    assert len(cfg.pretty_text.splitlines()) < 1000
    check_config(cfg, *train.ENTRIES, *test.ENTRIES)
    if said['data'] == 'custom':
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            dataset = loader.dataset.get('dataset', loader.dataset)
            assert tuple(dataset.extensions) == EXTENSIONS


def test_two_configs_of_one_name_build_one_model():
    one, other = 'spvit-mini_1xb64-50e_digits', 'spvit-mini_1xb64-20e_digits'
    assert read(one).model == read(other).model
    one = 'spvit-mini_upernet_1xb16-700i_digit-scenes-64x96'
    other = 'spvit-mini_upernet_1xb16-200i_folder-64x96'
    for part in ('backbone', 'neck', 'test_cfg'):
        assert read(one).model[part] == read(other).model[part]
    for one in ('spvit-medium_8xb128-300e_in1k', 'spvit-large_8xb100-300e_in1k'):
        base = ROOT / 'configs/_base_/models' / f'{one.split("_")[0]}.py'
        assert read(one).model == Config.fromfile(base).model


# REFERENCE, training recipe: drop path, images a step and when fine-tuned,
# augmentations an image, the resized edge at 224 and 384 pixels.
RECIPES = {
    'small': (0.1, 1024, 256, 2, 248, 426),
    'medium': (0.2, 1024, 128, 2, 224, 384),
    'large': (0.3, 800, 128, 3, 224, 384),
}


@pytest.mark.parametrize('name', [n for n in CLASSIFIERS if re.match('spvit.+in1k', n)])
def test_the_papers_recipe(name):
    cfg, said = read(name), NAME.fullmatch(name)
    size = re.match('spvit-([a-z]+)', name)[1]
    drop_path, images, tuning_images, policies, edge, tuning_edge = RECIPES[size]
    if '-ft-' in name:
        images, edge = tuning_images, tuning_edge
        assert cfg.optim_wrapper.optimizer.weight_decay == 1e-8
    else:
        assert cfg.optim_wrapper.optimizer.weight_decay == 0.05
        assert cfg.custom_hooks[0].momentum == pytest.approx(1 - 0.99992)
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.drop_path_rate) == (f'spvit-{size}', drop_path)
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    assert int(said['gpus']) * int(said['batch']) * accumulated == images
    assert cfg.auto_scale_lr.base_batch_size == images

    prefix = 'TokenLabel' if 'tokenlabel' in name else ''
    side = DATA[said['data']][1]
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert train[f'{prefix}RandomResizedCrop'].scale == side
    assert f'{prefix}RandomFlip' in train
    assert train['RandAugment'].num_policies == policies
    assert train['RandomErasing'].erase_prob == 0.25
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        test = {step.type: step for step in loader.dataset.pipeline}
        assert test['ResizeEdge'].scale == edge
        assert test['CenterCrop'].crop_size == side


# The learning rate at the first iteration, its highest, and at the last one.
RATES = {
    'spvit-small_8xb128-300e_in1k': (1e-6, 1.6e-3, 1e-5),
    'spvit-large_8xb100-300e_in1k': (1e-6, 6e-4, 1e-5),
    'spvit-large_8xb100-tokenlabel-300e_in1k': (1e-6, 6e-4, 1e-5),
    'spvit-large_8xb4-tokenlabel-ft-30e_in1k-384px': (5e-6, 5e-6, 5e-6),
    'spvit-small_1xb64-tokenlabel-100e_custom': (1.6e-6, 1.6e-3, 1e-5),
    'sp-deit-small_4xb256_in1k': (1e-6, 1e-3, 1e-5),
    'sp-deit-small_1xb64-100e_custom': (6.25e-8, 6.25e-5, 1e-6),
    'sp-deit-small_1xb64-ft-50e_custom': (5e-7, 5e-4, 1e-6),
    'sp-deit-tiny_1xb128-200e_cifar10': (1e-6, 1e-3, 1e-5),
    'spvit-mini_1xb64-50e_digits': (2e-6, 2e-3, 1e-5),
    'spvit-mini_1xb64-tokenlabel-20e_digits': (2e-6, 2e-3, 1e-5),
    'spvit-small_upernet_8xb2-160k_ade20k-512x512': (6e-11, 6e-5, 0),
    'spvit-small_upernet_8xb2-80k_ade20k-512x512': (6e-11, 6e-5, 0),
    'spvit-small_upernet_1xb4-20k_folder-512x512': (6e-11, 6e-5, 0),
    'spvit-mini_upernet_1xb16-700i_digit-scenes-64x96': (2e-6, 2e-3, 1e-5),
    'spvit-mini_upernet_1xb16-200i_folder-64x96': (2e-6, 2e-3, 1e-5),
}


@pytest.mark.parametrize(('name', 'expected'), RATES.items())
def test_learning_rate(name, expected):
    """Stepped as the Runner does, with epochs of 20 iterations."""
    cfg = read(name)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=cfg.optim_wrapper.optimizer.lr)
    by_epoch = cfg.train_cfg.get('by_epoch', False)
    length = cfg.train_cfg.max_epochs if by_epoch else cfg.train_cfg.max_iters
    schedulers = [
        PARAM_SCHEDULERS.build(
            {'end': length, **scheduler},
            default_args=dict(optimizer=optimizer, epoch_length=20),
        )
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    for i in range(length * (20 if by_epoch else 1)):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or i % 20 == 19:
                scheduler.step()
    assert rates[0] == pytest.approx(expected[0], rel=1e-3)
    assert max(rates) == pytest.approx(expected[1], rel=1e-3)
    # What ends by the epoch has one step to go at the last iteration.
    assert rates[-1] == pytest.approx(expected[2], rel=0.01, abs=expected[1] * 1e-3)


@pytest.mark.parametrize('name', PATHS)
def test_a_trial_of_any_length_has_a_schedule(name):
    """As `--cfg-options train_cfg.max_epochs=1` makes it, with 3 iterations an epoch."""
    cfg = read(name)
    by_epoch = cfg.train_cfg.get('by_epoch', False)
    whole = cfg.train_cfg.max_epochs if by_epoch else cfg.train_cfg.max_iters
    per_epoch = 3 if by_epoch else 1
    for length in (1, whole // 2, whole):
        lengths = {True: length if by_epoch else inf, False: length * per_epoch}
        settings, left_out = shorten_schedulers(cfg.param_scheduler, lengths)
        assert len(settings) + len(left_out) == len(cfg.param_scheduler)
        if length == whole:
            assert settings == cfg.param_scheduler
        highest = cfg.optim_wrapper.optimizer.lr
        weight = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=highest)
        schedulers = [
            PARAM_SCHEDULERS.build(
                {'end': length, **scheduler},
                default_args=dict(optimizer=optimizer, epoch_length=per_epoch),
            )
            for scheduler in settings
        ]
        assert all(
            scheduler.end <= lengths[scheduler.by_epoch] for scheduler in schedulers
        )
        if schedulers:
            # The last one ends with the training, or as long before it as it did.
            last, tail = schedulers[-1], cfg.param_scheduler[-1].get('end', whole)
            reached = last.end == lengths[last.by_epoch]
            assert reached == (length < whole or tail == whole)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifier(name, tmp_path, mmpretrain_scope):
    cfg, data = read(name), NAME.fullmatch(name)['data']
    classes, side, _ = DATA[data]
    # Data sets of small pictures hold them at the model's size.
    shape = (side, side, 3) if data.startswith('cifar') else (40, 56, 3)
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / 'image.png')
    label_map = torch.rand(2, min(5, classes), 18, 18).half()
    label_map[1] = 1
    batches = {}
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset = dataset.get('datasets', [dataset])[0]
        info = dict(img_path=str(tmp_path / 'image.png'), gt_label=1)
        if dataset.pipeline[0].type != 'LoadImageFromFile':
            info = dict(img=image, gt_label=1)
        if dataset.type == 'TokenLabelDataset':
            info.update(token_label=label_map, num_classes=classes)
        sample = Compose(dataset.pipeline)(info)
        assert sample['inputs'].shape == (3, side, side)
        # A crop, for the same reason as `shrink`.
        batches[split] = dict(
            inputs=torch.stack([sample['inputs']] * 2)[..., :96, :96],
            data_samples=[sample['data_samples']] * 2,
        )

    cfg = shrink(cfg)
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    model.init_weights()
    priors = [m for m in model.modules() if hasattr(m, 'relation')]
    assert len(priors) == (0 if '0spsa' in name or 'resnet' in name else 1)
    for prior in priors:
        # The smallest model starts local, as docs/studies.md says, but in its protocol.
        local = 'mini' in name and 'no-embed' not in name
        assert prior((2, 3)).eq(1).all() == (not local)

    losses = model(**model.data_preprocessor(batches['train'], True), mode='loss')
    assert ('loss_dense' in losses) == ('tokenlabel' in name)
    loss = sum(value for key, value in losses.items() if 'loss' in key)
    assert loss.isfinite()
    loss.backward()
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in learning if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        predictions = model(**model.data_preprocessor(batches['val']), mode='predict')
    assert predictions[0].pred_score.shape == (classes,)

    # A runner makes it before the hooks.
    Visualizer.get_instance('test_configs')
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        METRICS.build(evaluator)
    for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
        HOOKS.build(hook)


@pytest.mark.parametrize('name', [n for n in CLASSIFIERS if '-ft-30e' in n])
def test_fine_tuning_starts_from_the_end_of_its_training(name):
    """`load_from` names the last checkpoint of the config without '-ft'."""
    folder, file = read(name).load_from.split('/')[1:]
    assert folder in CLASSIFIERS
    assert re.match('spvit-[a-z]+', folder)[0] == re.match('spvit-[a-z]+', name)[0]
    assert ('tokenlabel' in folder) == ('tokenlabel' in name)
    assert file == 'epoch_310.pth'


@pytest.mark.parametrize('folder', ['classification', 'token_labeling'])
def test_heads_of_the_released_recipe_start_as_released(folder, mmpretrain_scope):
    (name,) = (n for n in names(folder) if n.startswith('spvit-small_8xb128'))
    head = MODELS.build(dict(read(name).model.head, num_classes=50))
    head.init_weights()
    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias.eq(0).all()
