"""What a model is, inside its wrappers, and what it makes of images."""

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


def reverses_channels(preprocessor) -> bool:
    """Whether a data preprocessor turns BGR to RGB, or RGB to BGR."""
    # The names of mmpretrain, of mmengine and its forks, and of the original mmseg.
    names = ('to_rgb', '_channel_conversion', 'channel_conversion')
    return any(getattr(preprocessor, name, False) for name in names)
