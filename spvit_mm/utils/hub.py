"""Our classifiers by name in mmpretrain's ModelHub.

``mmpretrain.get_model('sp-deit-small_4xb256_in1k')``, ``list_models('spvit-*')``
and the inferencers know them once ``spvit_mm`` is imported.
"""

from pathlib import Path

from mmengine.fileio import load

# The package's own tree: links in a source checkout, files in a wheel.
MIM_ROOT = Path(__file__).parents[1] / '.mim'
# The hub builds in mmpretrain's scope, where a segmentor is not found.
NOT_FOR_THE_HUB = 'configs/segmentation/'


def register_models(root=MIM_ROOT):
    """Register the classifiers of ``model-index.yml`` with the ModelHub.

    A metafile whose models are registered already is left out, so calling it
    again changes nothing.

    Args:
        root (str | Path): Folder with ``model-index.yml`` and ``configs/``.

    Returns:
        List[str]: The names added now.
    """
    from mmpretrain.apis.model import ModelHub

    added = []
    for name in load(str(Path(root) / 'model-index.yml'))['Import']:
        if name.startswith(NOT_FOR_THE_HUB):
            continue
        metafile = Path(root) / name
        models = [model['Name'] for model in load(str(metafile))['Models']]
        if all(ModelHub.has(model) for model in models):
            continue
        ModelHub.register_model_index(metafile, config_prefix=root)
        added += models
    return added
