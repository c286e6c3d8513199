_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['spvit_mm'], allow_failed_imports=False)

default_hooks = dict(
    # whole or absent, never half-written
    checkpoint=dict(type='AtomicCheckpointHook', interval=1),
    # a resumed run ends with the weights of an uninterrupted one
    random_state=dict(type='RandomStateHook'),
    # stops at a loss or weight that is nan
    finite=dict(type='FiniteHook'),
)
