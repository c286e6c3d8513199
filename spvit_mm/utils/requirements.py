"""Whether the OpenMMLab packages that we stand on are there and new enough.

The originals and their maintained forks (onedl) are published under different
names but fill the same import names, so the modules are asked, not pip.
"""

from importlib import import_module

MINIMUM_VERSIONS = {'mmengine': '0.10.3', 'mmcv': '2.0.1', 'mmpretrain': '1.2.0'}
INSTALL = (
    "Install the maintained forks with `pip install 'spvit-mm[onedl]'` or the "
    "originals with `pip install 'spvit-mm[openmmlab]'`."
)


def check_requirements(minimum_versions=None):
    """Import the OpenMMLab packages and check their versions.

    Args:
        minimum_versions (Dict[str, str], optional): Module name -> oldest
            version. Defaults to None: ``MINIMUM_VERSIONS``.

    Raises:
        ImportError: If one is missing or too old, with its name, the version
            found and the one needed.
    """
    for name, minimum in (minimum_versions or MINIMUM_VERSIONS).items():
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'spvit_mm needs {name}>={minimum}, which is not installed. {INSTALL}'
            ) from None
        from mmengine.utils import digit_version

        if digit_version(module.__version__) < digit_version(minimum):
            raise ImportError(
                f'spvit_mm needs {name}>={minimum}, but {name} {module.__version__} '
                f'is installed. {INSTALL}'
            )
