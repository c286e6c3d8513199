"""The tutorials of docs/ do as they say."""

from contextlib import nullcontext

import mmcv
import numpy as np
import pytest
import torch
from mmpretrain import get_model

from tests.pages import is_printed, read_blocks, run_page
from tests.test_convert.source_models import RELEASED, as_saved, make_state
from tests.test_engine.tiny import make_images


def deit(path):
    torch.save(dict(state_dict=get_model('deit-small_4xb256_in1k').state_dict()), path)


def for_finetuning(folder):
    """Pictures of four classes, two of each to learn and one to look at."""
    for split, number in (('train', 2), ('val', 1)):
        make_images(folder / f'data/custom/{split}', 'abcd', number)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    mmcv.imwrite(pixels, f'{folder}/picture.jpg')
    deit(folder / 'deit-small.pth')


def for_checkpoints(folder):
    """Files as the authors store them, and ImageNet with images of two classes."""
    spvit, deit = (as_saved(make_state(RELEASED[x])) for x in ('SP-ViT-S', 'DeiT-S'))
    torch.save(dict(state_dict=spvit), folder / 'spvit_s.pth.tar')
    torch.save(dict(model=deit), folder / 'deit_small.pth')
    for split in ('train', 'val'):
        place = folder / 'data/imagenet' / split
        for i in range(1000):
            (place / f'n{i:04d}').mkdir(parents=True)
        make_images(place, ['n0007', 'n0300'], 2)


def nothing(folder):
    """The digits come with scikit-learn."""


TUTORIALS = {
    'checkpoints': for_checkpoints,
    'deploy': nothing,
    'finetuning': for_finetuning,
    'gallery': nothing,
    'own_prior': nothing,
    'segmentation': nothing,
    'token_labeling': nothing,
}


@pytest.mark.slow
@pytest.mark.parametrize(('page', 'prepare'), TUTORIALS.items())
def test_a_tutorial_prints_what_it_says(page, prepare, tmp_path):
    prepare(tmp_path)
    run_page(f'docs/{page}.md', tmp_path)


@pytest.mark.parametrize('page', TUTORIALS)
def test_a_tutorial_says_what_it_prints(page):
    kinds = [block.kind.split()[0] for block in read_blocks(f'docs/{page}.md')]
    assert ('bash', 'text') in zip(kinds, kinds[1:], strict=False)


def test_lines_of_a_text_block():
    output = '11/21 - INFO - Epoch(val) [1]   accuracy/top1: 99.7  time: 0.1\nDone (2)'
    for line in (
        'Epoch(val) [1] accuracy/top1: 9...',
        'Done (2)',
        '... - INFO - Epoch',
    ):
        assert is_printed(line, output)
    for line in ('accuracy/top1: 8...', 'Done (3)', 'Epoch(val) ... Done'):
        assert not is_printed(line, output)


PAGE = """
```bash
echo a 1 b; A=3
```
```text
a ... b
```
```text
of nothing that was run
```
```bash
echo $A
```
```text measured
{line}
not looked at
```
"""


@pytest.mark.parametrize(('line', 'printed'), [('3', True), ('4', False)])
def test_a_page_is_one_shell(line, printed, tmp_path):
    (tmp_path / 'page.md').write_text(PAGE.replace('{line}', line))
    with nullcontext() if printed else pytest.raises(AssertionError, match='^4\n\n3\n'):
        run_page(tmp_path / 'page.md', tmp_path)


def test_a_command_that_fails(tmp_path):
    (tmp_path / 'page.md').write_text('```bash\necho before\nfalse\n```\n')
    with pytest.raises(AssertionError, match='before'):
        run_page(tmp_path / 'page.md', tmp_path)
