from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop
from mmpretrain.registry import HOOKS


@HOOKS.register_module()
class ResumeReportHook(Hook):
    """Say what resuming does not do: train past the end, or follow a new schedule.

    A training that has reached its length ends at once, as it should for a job that is
    started again and again. And the schedulers of the checkpoint take the place of
    those of the config: a training that goes on for longer than it was meant to keeps
    the learning rates of its first length.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if not runner._resume:
            return
        loop = runner.train_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        unit, length = (
            ('epoch', loop.max_epochs) if by_epoch else ('iter', loop.max_iters)
        )
        done, option = checkpoint['meta'][unit], f'train_cfg.max_{unit}s'
        if done >= length:
            runner.logger.warning(
                f'Nothing is left to train: the checkpoint was written after {unit} '
                f'{done}, and {option} is {length}. To train longer, raise {option}.'
            )
            return
        carried = _schedulers(checkpoint.get('param_schedulers'))
        built = [vars(x) for x in _schedulers(runner.param_schedulers)]
        if not carried or [x['end'] for x in carried] == [x['end'] for x in built]:
            return
        per_epoch = len(loop.dataloader)
        end = max(x['end'] * (per_epoch if x['by_epoch'] else 1) for x in carried)
        end = end // per_epoch if by_epoch else end
        runner.logger.warning(
            f'The checkpoint carries a schedule of another length, which ends at {unit} '
            f'{end}. It goes on as it was: what comes after that has the learning rate '
            'of its end. For a schedule over the whole length start a new training '
            'from these weights, with load_from=CHECKPOINT in place of --resume.'
        )


def _schedulers(found) -> list:
    """The schedulers of all optimizers, each of which has a list of them."""
    if isinstance(found, dict):
        return [scheduler for group in found.values() for scheduler in group]
    return list(found or [])
