"""Building the children of our modules from their configs."""

from mmpretrain.registry import MODELS


def build_child(cfg, what, **defaults):
    """Build a module from its config, in mmpretrain's scope by default.

    Inside an mmsegmentation model the default scope is ``mmseg``, where a bare
    ``type='MLPSpatialPrior'`` is not found. So a config that names no scope of
    its own is resolved in ``mmpretrain``.

    Args:
        cfg (dict): Config with a ``type`` (a registered name or a class).
        what (str): Name of the argument that held ``cfg``, for the error.
        **defaults: Arguments for those keys that ``cfg`` does not set.

    Returns:
        nn.Module: The built module.

    Raises:
        ValueError: If ``cfg`` is no dict with a ``type``, or the name is not
            registered.
        TypeError: For an argument that the type does not take.
    """
    cls = resolve_type(cfg, what)
    cfg = {**defaults, **cfg, 'type': cls}
    cfg.setdefault('_scope_', 'mmpretrain')
    try:
        return MODELS.build(cfg)
    except TypeError as error:
        text = str(error)
        if 'unexpected keyword argument' not in text or '_delete_' in text:
            raise  # another mistake, or told by the child of a child
        raise TypeError(
            f'`{what}` of type {cls.__name__}: {text}. (Where a config gives another '
            "type than its base, the base's arguments stay, unless the dict says "
            '_delete_=True.)'
        ) from error


def resolve_type(cfg, what):
    """Return the class that ``cfg['type']`` names (see :func:`build_child`)."""
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(
            f'`{what}` must be a config dict with a `type`, but got {cfg!r}.'
        )
    cls = cfg['type']
    if isinstance(cls, str):
        with MODELS.switch_scope_and_registry(
            cfg.get('_scope_', 'mmpretrain')
        ) as registry:
            cls = registry.get(cfg['type'])
        if cls is None:
            raise ValueError(
                f'`{what}` names the type {cfg["type"]!r}, which is not registered. '
                'Import the module that registers it (`custom_imports` in a '
                'config), or write its scope in front, as in `mmseg.Name`.'
            )
    return cls
