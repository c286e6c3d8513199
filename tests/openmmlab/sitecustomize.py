"""Names for mmcv's compiled operators, which mmcv-lite has not.

The original mmsegmentation imports them all, and no model here calls one. Python runs
this file at its start where the folder is in PYTHONPATH, as in `make test-openmmlab`.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class Operators(ModuleType):
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f'mmcv-lite has no operator {name}')

        return missing


operators = sys.modules['mmcv._ext'] = Operators('mmcv._ext')
# mmengine asks for its loader: there is none, so this is no full mmcv.
operators.__spec__ = ModuleSpec('mmcv._ext', None)
