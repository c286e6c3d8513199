"""What of an SPViT does not learn."""

from .priors import SpatialPrior


def check_freezing(model):
    """Raise a ValueError for arguments of freezing that do not fit the model."""
    if not model.freeze_all_but_priors:
        return
    if not _learned_by_priors(model):
        raise ValueError(
            '`freeze_all_but_priors` would freeze everything: the backbone '
            'has no spatial prior with parameters. Set `num_spsa_layers` to 1 or more, '
            'and a `prior` that learns, such as MLPSpatialPrior.'
        )
    if model.frozen_stages > 0:
        raise ValueError(
            '`freeze_all_but_priors` and `frozen_stages` exclude each other, '
            f'got frozen_stages={model.frozen_stages}. Leave it at -1.'
        )


def freeze(model):
    """Freeze what the arguments of an SPViT say, and what no output depends on.

    Frozen layers are in eval mode, too. To be called again whenever the model's mode
    was set to training.
    """
    for param in unused_parameters(model):
        param.requires_grad = False
    if model.frozen_stages > 0:
        model._freeze_stages()
    if not model.freeze_all_but_priors:
        return
    learning = _learned_by_priors(model)
    for param in model.parameters():
        param.requires_grad = param.requires_grad and id(param) in learning
    for module in model.modules():
        module.training = False
    for prior in _priors(model):
        prior.train()
    # Of the backbone itself: gradient checkpointing asks for it.
    model.training = True


def _priors(model):
    return [module for module in model.modules() if isinstance(module, SpatialPrior)]


def _learned_by_priors(model):
    """The ids of the parameters that belong to a prior."""
    return {id(param) for prior in _priors(model) for param in prior.parameters()}


def unused_parameters(model):
    """Yield the parameters behind the last output, whose gradients DDP would await."""
    last = max(model.out_indices, default=-1)
    if last < 0:
        return
    unused = list(model.layers[last + 1 :])
    if last < model.num_layers - 1 and model.final_norm:
        unused.append(model.ln1)
    if model.out_type == 'cls_token' and model.layers[last].peg is not None:
        # The class token passes the last PEG untouched.
        unused.append(model.layers[last].peg)
    for module in unused:
        yield from module.parameters()
    if model.with_cls_token and model.cls_token_layer > last:
        yield model.cls_token
