"""Import, build and run a forward: that the original OpenMMLab stack will do.

make smoke-openmmlab
"""

import mmcv
import mmengine
import mmpretrain
import torch
from mmengine.registry import init_default_scope
from mmpretrain import get_model, list_models
from mmpretrain.registry import MODELS

import spvit_mm


def main():
    print(
        f'spvit_mm {spvit_mm.__version__}, torch {torch.__version__}, '
        f'mmengine {mmengine.__version__}, mmcv {mmcv.__version__}, '
        f'mmpretrain {mmpretrain.__version__}'
    )
    init_default_scope('mmpretrain')
    for name in [*list_models('spvit-'), *list_models('sp-deit-')]:
        model = get_model(name)
        cfg = model._config
        size = cfg.model.backbone.get('img_size', 224)
        # Not square: what the authors' code cannot take.
        image = torch.rand(1, 3, size, size + 16)
        with torch.no_grad():
            (out,) = model.extract_feat(image)[-1:]
        params = sum(p.numel() for p in model.parameters())
        print(f'{name}: {params:,} parameters, features {tuple(out.shape)}')

    model = MODELS.build(dict(type='SPViT', arch='deit-tiny', img_size=64))
    model.init_weights()
    out = model(torch.rand(2, 3, 64, 96))[0]
    # A plain sum of what a LayerNorm gives is 0 whatever the model does.
    (out * torch.randn_like(out)).sum().backward()
    grad = model.layers[0].attn.prior.w2.grad
    assert grad is not None
    assert grad.abs().sum() > 0
    print('A training step reaches the priors.')


if __name__ == '__main__':
    main()
