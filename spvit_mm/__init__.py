"""Spatial priors in vision transformers for OpenMMLab.

Importing the package registers everything: a config needs only
``custom_imports = dict(imports=['spvit_mm'])``.
"""

from .utils.requirements import check_requirements
from .version import __version__

check_requirements()

from . import apis, datasets, engine, models  # noqa: E402, F401
from .utils.hub import register_models  # noqa: E402

register_models()

__all__ = ['__version__']
