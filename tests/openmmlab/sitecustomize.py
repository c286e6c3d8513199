"""Names for mmcv's compiled operators, which mmcv-lite has not.

The original mmsegmentation imports them all, and no model here calls one. Python runs
this file at its start where the folder is in PYTHONPATH, as in `make test-openmmlab`.
"""

import sys
from types import ModuleType


class Operators(ModuleType):
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f'mmcv-lite has no operator {name}')

        return missing


sys.modules['mmcv._ext'] = Operators('mmcv._ext')
