"""Schedules of a training that the command line has made shorter than its config."""

from math import inf

LENGTHS = ('train_cfg.max_epochs', 'train_cfg.max_iters')


def shorten_schedulers(schedulers, lengths: dict) -> tuple[list, list]:
    """Fit the schedulers of a config into a shorter training.

    mmengine refuses a scheduler that begins where the training ends, and leaves one
    that ends later in the middle of its way.

    Args:
        schedulers (dict | list[dict]): The configs of the schedulers.
        lengths (dict): Epochs of the training under True, iterations under False; inf
            where the loop does not count them.

    Returns:
        tuple: The schedulers that begin before the end, none of which ends later, as
        new dicts; and a sentence on each that was left out.
    """
    kept, left_out = [], []
    for scheduler in [schedulers] if isinstance(schedulers, dict) else schedulers:
        by_epoch = scheduler.get('by_epoch', True)
        length = lengths[by_epoch]
        begin, end = scheduler.get('begin', 0), scheduler.get('end', inf)
        if begin >= length:
            unit = 'epoch' if by_epoch else 'iteration'
            left_out.append(
                f'{scheduler["type"]} would begin after {unit} {begin} of {length}'
            )
            continue
        scheduler = dict(scheduler)
        if end > length and 'end' in scheduler:
            scheduler['end'] = length
        if 'T_max' in scheduler:
            scheduler['T_max'] = min(scheduler['T_max'], length - begin)
        kept.append(scheduler)
    return kept, left_out
