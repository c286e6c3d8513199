"""Models inside their wrappers."""

from mmengine.model import BaseTTAModel, is_model_wrapper


def unwrap_model(model):
    """The model itself, without DDP and the like, and without test-time augmentation.

    Args:
        model (nn.Module): Any model.

    Returns:
        nn.Module: ``model``, or what its wrappers hold.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
