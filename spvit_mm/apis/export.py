"""Models as files that run without this package: ONNX and torch.export.

A classifier is exported from images to logits, a segmentor from images to the logits
of its decode head, each as its ``forward(images, mode='tensor')``. Images come in as
the data preprocessor hands them out: normalised, float32, (B, 3, h, w).
"""

import io
import warnings
from contextlib import redirect_stdout
from typing import Optional

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.utils import digit_version
from torch import Tensor, nn

from ..models import SPViT
from ..utils import UserError

# Exporters that trace with torch.export, where the batch can be a symbol.
HAS_EXPORT = digit_version(torch.__version__) >= digit_version('2.5')
OPSET = 18 if HAS_EXPORT else 17


class TensorMode(nn.Module):
    """A model of OpenMMLab whose forward takes images and gives its tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor):
        return self.model(images, mode='tensor')


def prepare(model: nn.Module, shape: tuple[int, int]) -> TensorMode:
    """Make a model ready for export, in place.

    Its priors are folded into constants for the grid of the image, and its attention
    computes with plain operations alone.

    Args:
        model (nn.Module): A classifier or segmentor.
        shape (tuple[int, int]): Height and width of the image, in pixels.

    Returns:
        TensorMode: The model in evaluation mode, from images to logits.

    Raises:
        UserError: If the model was deployed for another grid.
    """
    model = revert_sync_batchnorm(model)
    for module in list(model.modules()):
        if hasattr(module, 'attn_impl'):
            module.attn_impl = 'eager'
        if isinstance(module, SPViT):
            image = torch.zeros(1, 3, *shape)
            with torch.no_grad():
                _, grid = module.forward_stem(image)
            try:
                module.switch_to_deploy(grid)
            except ValueError as error:  # it was deployed before, for another grid
                raise UserError(
                    f'The model cannot take images of {shape[0]} x {shape[1]}: {error}'
                ) from error
    return TensorMode(model).eval()


def save_program(
    model: nn.Module, path: str, images: Tensor, dynamic_batch: bool = False
) -> None:
    """Write a model with torch.export; ``torch.export.load`` reads it.

    Args:
        model (nn.Module): What :func:`prepare` returned.
        path (str): Where to write.
        images (Tensor): An example, (B, 3, h, w), B of at least 2.
        dynamic_batch (bool): Whether the file takes any number of images, and not
            that of the example alone. Defaults to False.

    Raises:
        UserError: If torch is older than 2.5.
    """
    if not HAS_EXPORT:
        raise UserError(
            f'.pt2 needs torch >= 2.5, and this is torch {torch.__version__}. '
            'Write .onnx, or update torch.'
        )
    dynamic = {'images': {0: torch.export.Dim('batch')}} if dynamic_batch else None
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
        torch.export.save(program, path)


def save_onnx(
    model: nn.Module,
    path: str,
    images: Tensor,
    dynamic_batch: bool = False,
    opset: int = OPSET,
) -> None:
    """Write a model as ONNX, with operators of the standard alone.

    Args:
        model (nn.Module): What :func:`prepare` returned.
        path (str): Where to write; input ``images``, output ``logits``.
        images (Tensor): An example, (B, 3, h, w), B of at least 2.
        dynamic_batch (bool): As in :func:`save_program`. Defaults to False.
        opset (int): Version of the operators. Defaults to 18, and 17 for torch < 2.5.

    Raises:
        UserError: If a package is missing or the file needs other operators.
    """
    try:
        import onnx

        if HAS_EXPORT:
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'ONNX needs {error.name}, which is not installed: '
            'pip install -r requirements/deploy.txt'
        ) from error
    names = dict(input_names=['images'], output_names=['logits'])
    with torch.no_grad(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # The size of the image is a constant of the file, and is meant to be.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        if HAS_EXPORT:
            dim = {0: torch.export.Dim('batch')}
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=True,
                external_data=False,
                dynamic_shapes={'images': dim} if dynamic_batch else None,
                opset_version=opset,
                verbose=False,
                **names,
            )
        else:
            axes = {name: {0: 'batch'} for name in ('images', 'logits')}
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamic_axes=axes if dynamic_batch else None,
                opset_version=opset,
                **names,
            )
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    foreign = sorted({n.domain for n in proto.graph.node if n.domain})
    if foreign:
        raise UserError(
            f'The model needs operators of {", ".join(foreign)} in opset {opset}. Try '
            f'--opset {OPSET}.'
        )


class Difference:
    """How far an exported file's logits are from the model's.

    Attributes:
        largest (float): The largest difference, relative to the largest logit where
            that is above 1.
        same_top1 (bool): Whether the top-1 class of every image is the same; for
            logits of every pixel, of 999 in 1000, since some pixel is always a tie.
    """

    def __init__(self, ours: Tensor, theirs: Tensor) -> None:
        unit = float(ours.abs().max().clamp(min=1))
        self.largest = float((ours - theirs).abs().max()) / unit
        same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
        self.same_top1 = float(same) >= (1 if ours.dim() == 2 else 0.999)


def run_file(path: str, images: Tensor) -> Optional[Tensor]:
    """Logits (B, ...) of images (B, 3, h, w) by an exported file.

    Returns:
        Tensor | None: None for .onnx where onnxruntime is not installed.
    """
    if path.endswith('.pt2'):
        with torch.no_grad():
            return torch.export.load(path).module()(images)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
