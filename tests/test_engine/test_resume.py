"""A resumed run ends with the weights of the uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import spvit_mm  # noqa: F401
from tests.test_engine.tiny import make_data, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(config: Path, work_dir: Path, resume: Path = None, **options) -> dict:
    cfg = Config.fromfile(config)
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(options)
    # Runners of the same second would share mmengine's global instances.
    cfg.experiment_name = f'{work_dir.parent.name}_{work_dir.name}'
    if resume is not None:
        cfg.resume, cfg.load_from = True, str(resume)
    runner = Runner.from_cfg(cfg)
    # Whatever ran before in this process must not matter.
    if resume is not None:
        torch.rand(7)
    model = runner.train()
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal(actual: dict, expected: dict) -> None:
    different = [k for k in expected if not torch.equal(actual[k], expected[k])]
    assert not different


CASES = {
    'epochs': dict(),
    'epochs-no-seed': dict(seed=None),
    'epochs-2-workers': dict(workers=2, seed=None),
    'epochs-2-persistent-workers': dict(workers=2, persistent=True),
    'iters': dict(by_epoch=False),
    'iters-no-seed': dict(by_epoch=False, seed=None),
    'iters-2-workers': dict(by_epoch=False, workers=2, seed=None),
    'iters-2-persistent-workers': dict(by_epoch=False, workers=2, persistent=True),
    'iters-finite-sampler': dict(by_epoch=False, sampler='DefaultSampler', seed=None),
    'iters-finite-sampler-2-workers': dict(
        by_epoch=False, sampler='DefaultSampler', workers=2
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_resumed_weights(case, data, tmp_path):
    arguments = CASES[case]
    by_epoch = arguments.get('by_epoch', True)
    length, at, name = (4, 2, 'epoch') if by_epoch else (9, 5, 'iter')
    config = write_config(
        tmp_path / 'c.py', data, length=length, interval=at, **arguments
    )
    whole = run(config, tmp_path / 'whole')
    checkpoint = tmp_path / 'whole' / f'{name}_{at}.pth'
    early = torch.load(checkpoint, weights_only=False)['state_dict']
    resumed = run(config, tmp_path / 'resumed', checkpoint)
    assert_equal(resumed, whole)
    assert any(not torch.equal(early[k], whole[k]) for k in whole)


def test_resumed_weights_with_rescaled_coordinates(data, tmp_path):
    config = write_config(tmp_path / 'c.py', data, length=4, interval=2)
    backbone = dict(
        type='SPViT',
        num_spsa_layers=1,
        attn_cfg=dict(type='RotaryPositionAttention'),
        coords_rescale=2.0,
        coords_jitter=1.2,
    )
    options = {f'model.backbone.{name}': value for name, value in backbone.items()}
    whole = run(config, tmp_path / 'whole', **options)
    checkpoint = tmp_path / 'whole' / 'epoch_2.pth'
    assert_equal(run(config, tmp_path / 'resumed', checkpoint, **options), whole)


def test_without_the_hook_it_differs(data, tmp_path):
    """The test above can fail: mmengine alone does not resume exactly."""
    config = write_config(tmp_path / 'c.py', data, length=4, interval=2)
    off = {'default_hooks.random_state': dict(type='IterTimerHook')}
    whole = run(config, tmp_path / 'whole', **off)
    resumed = run(
        config, tmp_path / 'resumed', tmp_path / 'whole' / 'epoch_2.pth', **off
    )
    assert any(not torch.equal(resumed[k], whole[k]) for k in whole)


def test_validation_changes_nothing(data, tmp_path):
    config = write_config(tmp_path / 'c.py', data, length=2)
    off = dict(val_cfg=None, val_dataloader=None, val_evaluator=None)
    assert_equal(run(config, tmp_path / 'a', **off), run(config, tmp_path / 'b'))


def test_best_checkpoint_and_plain_types(data, tmp_path):
    config = write_config(tmp_path / 'c.py', data, length=2)
    run(config, tmp_path, **{'default_hooks.checkpoint.save_best': 'auto'})
    (best,) = tmp_path.glob('best_*.pth')
    for path in (best, tmp_path / 'epoch_2.pth'):
        state = torch.load(path, weights_only=False)['random_state']
        torch.save(state, tmp_path / 'state.pth')
        state = torch.load(tmp_path / 'state.pth', weights_only=True)
        assert len(state['ranks']) == 1
        assert state['ranks'][0]['sampler_seed'] == 0


def test_checkpoint_without_state(data, tmp_path):
    config = write_config(tmp_path / 'c.py', data, length=2)
    run(config, tmp_path / 'a')
    checkpoint = torch.load(tmp_path / 'a' / 'epoch_1.pth', weights_only=False)
    del checkpoint['random_state']
    torch.save(checkpoint, tmp_path / 'old.pth')
    run(config, tmp_path / 'b', tmp_path / 'old.pth')
    (log,) = (tmp_path / 'b').glob('*/*.log')
    lines = [x for x in log.read_text().splitlines() if 'random state' in x]
    assert len(lines) == 1
    assert 'it holds none' in lines[0]


def test_workers_draw_anew_every_epoch(data, tmp_path):
    """mmengine's own seeding of workers repeats itself every epoch."""
    from spvit_mm.engine.hooks.worker_seeder import WorkerSeeder

    seeder = WorkerSeeder(None, None, seed=0, rank=0, batches_per_pass=5)
    seen = {}
    for worker in range(2):
        seeder._loaded = 0
        for _ in range(3 - worker):  # batches 0 2 4 and 1 3
            seen[seeder.position(worker, 2)] = worker
            seeder._loaded += 1
        assert seeder.position(worker, 2) == (1, worker)
    assert sorted(seen) == [(0, i) for i in range(5)]


DISTRIBUTED = """
import sys
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.runner import Runner
from spvit_mm.apis import distribute_on_cpu

torch.set_num_threads(1)
for job in sys.argv[1:]:
    config, out, *resume = job.split(',')
    cfg = Config.fromfile(config)
    cfg.launcher, cfg.work_dir, cfg.experiment_name = 'pytorch', out, out
    if resume:
        cfg.resume, cfg.load_from = True, resume[0]
    distribute_on_cpu(cfg)
    model = Runner.from_cfg(cfg).train().module
    torch.save(model.state_dict(), f'{out}/rank{get_rank()}.pth')
"""


def test_two_processes(data, tmp_path):
    """Both loops, resumed in processes of their own."""
    script = tmp_path / 'run.py'
    script.write_text(DISTRIBUTED)

    def launch(*jobs):
        command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
        jobs = [','.join(map(str, job)) for job in jobs]
        subprocess.run(
            [sys.executable, *command, str(script), *jobs],
            check=True,
            capture_output=True,
            timeout=300,
            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        )

    epochs, iters = tmp_path / 'epochs.py', tmp_path / 'iters.py'
    write_config(epochs, data, length=3, seed=None)
    write_config(
        iters, data, by_epoch=False, length=6, interval=3, workers=1, seed=None
    )
    cases = {'epochs': (epochs, 'epoch_1.pth'), 'iters': (iters, 'iter_3.pth')}
    launch(*((config, tmp_path / name) for name, (config, _) in cases.items()))
    launch(
        *(
            (config, tmp_path / f'{name}_resumed', tmp_path / name / checkpoint)
            for name, (config, checkpoint) in cases.items()
        )
    )
    for name, (_, checkpoint) in cases.items():
        checkpoint = torch.load(tmp_path / name / checkpoint, weights_only=False)
        assert len(checkpoint['random_state']['ranks']) == 2
        expected = torch.load(tmp_path / name / 'rank0.pth')
        assert_equal(torch.load(tmp_path / name / 'rank1.pth'), expected)
        for rank in range(2):
            resumed = tmp_path / f'{name}_resumed' / f'rank{rank}.pth'
            assert_equal(torch.load(resumed), expected)
