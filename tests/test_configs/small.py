"""Where tests find configs, and how they make them small enough to run."""

from pathlib import Path

from mmengine.config import Config

from spvit_mm.models import SPViT

ROOT = Path(__file__).parents[2]
PATHS = {path.stem: path for path in sorted((ROOT / 'configs').glob('[!_]*/*.py'))}


def names(folder):
    """The names of a folder's configs."""
    return [name for name, path in PATHS.items() if path.parent.name == folder]


def read(name):
    """A config by its name."""
    return Config.fromfile(str(PATHS[name]))


def shrink(cfg):
    """Cut the backbone to as many layers as it has outputs, two at least.

    The layers keep their widths; the first is SP-SA if any was. The full depth
    costs minutes over all configs.
    """
    backbone = cfg.model.backbone
    arch = backbone.get('arch')
    if arch is None:
        return cfg  # the teacher, a small ResNet
    outputs = backbone.get('out_indices', -1)
    num_layers = 2 if isinstance(outputs, int) else len(outputs)
    arch = SPViT.arch_zoo[arch] if isinstance(arch, str) else arch
    backbone.arch = {**arch, 'num_layers': num_layers}
    backbone.num_spsa_layers = min(1, backbone.get('num_spsa_layers', 1))
    if isinstance(outputs, int):
        backbone.out_indices = -1
    else:
        backbone.out_indices = tuple(range(num_layers))
    return cfg
