"""Models as files that run without this package: ONNX and torch.export.

A classifier is exported from images to logits, a segmentor from images to the logits
of its decode head, each as its ``forward(images, mode='tensor')``. Images come in as
the data preprocessor hands them out: normalised, float32, (B, 3, h, w).
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.model import revert_sync_batchnorm
from mmengine.utils import digit_version
from torch import Tensor, nn

from ..models import SPViT
from ..ops.compat import is_free
from ..utils import UserError

# Exporters that trace with torch.export, where the batch can be a symbol.
HAS_EXPORT = digit_version(torch.__version__) >= digit_version('2.5')
OPSET = 18 if HAS_EXPORT else 17
# Those that leave a size free for which they find conditions. (Before, the exporter that
# traces with torch.jit does so.)
HAS_FREE_SIZES = digit_version(torch.__version__) >= digit_version('2.7')


class TensorMode(nn.Module):
    """A model of OpenMMLab whose forward takes images and gives its tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor):
        return self.model(images, mode='tensor')


class FreePadding(nn.Module):
    """An AdaptivePadding, where an exporter leaves the sides of the image free.

    mmcv's asks whether anything is to be padded, which would be answered once for all.
    This one pads by 0 pixels, too. It is for patches that do not overlap.
    """

    def __init__(self, padding: AdaptivePadding) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        sides = (x.shape[2], x.shape[3])
        if not is_free(sides):
            return self.padding(x)
        bottom, right = (
            (side + patch - 1) // patch * patch - side
            for side, patch in zip(sides, self.padding.stride, strict=True)
        )
        return F.pad(x, (0, right, 0, bottom))


class FreePooling(nn.Module):
    """An AdaptiveAvgPool2d, where an exporter leaves the sides of its input free.

    ONNX has no such operator, and torch's exporter (2.12) writes one for the side of its
    example, without a word. Here it is two products: bin i of n averages the places
    from floor(i * side / n) up to ceil((i + 1) * side / n).
    """

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        sides, bins = (x.shape[2], x.shape[3]), self.pool.output_size
        if not is_free(sides):
            return self.pool(x)
        bins = bins if isinstance(bins, tuple) else (bins, bins)
        rows, columns = (
            self._averages(side, number, x)
            for side, number in zip(sides, bins, strict=True)
        )
        return rows @ x @ columns.t()

    @staticmethod
    def _averages(side: int, number: int, x: Tensor) -> Tensor:
        """The matrix (number, side) whose product with a column averages its bins."""
        bin_ = torch.arange(number, device=x.device)[:, None]
        place = torch.arange(side, device=x.device)
        start, end = bin_ * side // number, ((bin_ + 1) * side + number - 1) // number
        inside = ((place >= start) & (place < end)).to(x.dtype)
        return inside / inside.sum(dim=1, keepdim=True)


def prepare(
    model: nn.Module, shape: tuple[int, int], dynamic_size: bool = False
) -> TensorMode:
    """Make a model ready for export, in place.

    Its attention computes with plain operations alone. For images of one size its
    priors are folded into constants.

    Args:
        model (nn.Module): A classifier or segmentor.
        shape (tuple[int, int]): Height and width of the image, in pixels.
        dynamic_size (bool): Whether the export takes other sizes, too. Then nothing is
            folded, and what asks for the size of its input is replaced by what computes
            with it. Defaults to False.

    Returns:
        TensorMode: The model in evaluation mode, from images to logits.

    Raises:
        UserError: If the image is smaller than a patch, or the model was deployed for
            another grid or, with ``dynamic_size``, at all.
    """
    model = revert_sync_batchnorm(model).eval()
    for module in list(model.modules()):
        if isinstance(module, AdaptivePadding):
            _check_patch(shape, module.stride)
        if hasattr(module, 'attn_impl'):
            module.attn_impl = 'eager'
        if isinstance(module, SPViT):
            if dynamic_size:
                _free_grid(module)
            else:
                _fold(module, shape)
    if dynamic_size:
        _free_sizes(model)
    return TensorMode(model).eval()


def _check_patch(shape: tuple[int, int], patch: tuple[int, int]) -> None:
    if any(side < least for side, least in zip(shape, patch, strict=True)):
        raise UserError(
            f'Images of {shape[0]} x {shape[1]} pixels are smaller than a patch of the '
            f'model, {patch[0]} x {patch[1]}. Give larger ones with --shape.'
        )


def _fold(backbone: SPViT, shape: tuple[int, int]) -> None:
    with torch.no_grad():
        _, grid = backbone.forward_stem(torch.zeros(1, backbone.in_channels, *shape))
    try:
        backbone.switch_to_deploy(grid)
    except UserError as error:  # it was deployed before, for another grid
        raise UserError(
            f'The model cannot take images of {shape[0]} x {shape[1]}: {error}'
        ) from error


def _free_grid(backbone: SPViT) -> None:
    if backbone.deploy:
        raise UserError(
            'The model is in deploy form: its priors are tables for one grid, and it '
            'takes images of one size. With --dynamic-size export the checkpoint that '
            'it was made from, or leave --dynamic-size out.'
        )
    backbone.free_grid = True


def _free_sizes(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AdaptivePadding) and (
                child.padding == 'corner' and child.kernel_size == child.stride
            ):
                setattr(parent, name, FreePadding(child))
            elif isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, FreePooling(child))


def check_finite(model: nn.Module, images: Tensor) -> None:
    """Raise a UserError, which names the module, where an output is no number.

    Args:
        model (nn.Module): What :func:`prepare` returned.
        images (Tensor): An example, (B, 3, h, w).
    """
    names = {module: name for name, module in model.named_modules()}

    def check(module, inputs, outputs):
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        for output in outputs:
            if isinstance(output, Tensor) and not output.isfinite().all():
                raise UserError(
                    'The model computes nan or infinity, first in the output of '
                    f'{names[module].removeprefix("model.")} '
                    f'({type(module).__name__}). Nothing is written.'
                )

    hooks = [module.register_forward_hook(check) for module in names]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _naming_operators() -> Iterator[None]:
    """Turn an exporter's error into one line, which names the operator if there is one."""
    try:
        yield
    except RuntimeError as error:  # the root of what the exporters raise
        found = re.search(r"(?:target=torch\.ops\.|operator '?)([\w:.]+)", str(error))
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            'The model cannot be exported'
            + (f': the operator {found[1]} stands in the way' if found else '')
            + f' ({" ".join(str(cause).split())[:400]}).'
        ) from error


def _free_axes(dynamic_batch: bool, dynamic_size: bool) -> dict[int, str]:
    """The axes of the images that a file leaves free, and their names."""
    axes = {0: 'batch'} if dynamic_batch else {}
    return {**axes, 2: 'height', 3: 'width'} if dynamic_size else axes


def save_program(
    model: nn.Module,
    path: str,
    images: Tensor,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
) -> None:
    """Write a model with torch.export; ``torch.export.load`` reads it.

    Args:
        model (nn.Module): What :func:`prepare` returned.
        path (str): Where to write.
        images (Tensor): An example, (B, 3, h, w), B of at least 2 where it is free.
        dynamic_batch (bool): Whether the file takes any number of images, and not
            that of the example alone. Defaults to False.
        dynamic_size (bool): Whether it takes any height and width; the model was
            prepared for that. Defaults to False.

    Raises:
        UserError: If torch is older than 2.5 (2.7 for ``dynamic_size``), or the model
            cannot be exported so.
    """
    if not (HAS_FREE_SIZES if dynamic_size else HAS_EXPORT):
        least = '2.7' if dynamic_size else '2.5'
        raise UserError(
            f'.pt2 needs torch >= {least}{" with --dynamic-size" if dynamic_size else ""}'
            f', and this is torch {torch.__version__}. Write .onnx, or update torch.'
        )
    dims = {
        # One that is found out, and not declared, may have a least size.
        axis: torch.export.Dim.DYNAMIC if dynamic_size else torch.export.Dim(name)
        for axis, name in _free_axes(dynamic_batch, dynamic_size).items()
    }
    with torch.no_grad():
        with _naming_operators():
            program = torch.export.export(
                model, (images,), dynamic_shapes={'images': dims} if dims else None
            )
        torch.export.save(program, path)


def save_onnx(
    model: nn.Module,
    path: str,
    images: Tensor,
    dynamic_batch: bool = False,
    opset: int = OPSET,
    dynamic_size: bool = False,
) -> None:
    """Write a model as ONNX, with operators of the standard alone.

    Args:
        model (nn.Module): What :func:`prepare` returned.
        path (str): Where to write; input ``images``, output ``logits``.
        images (Tensor): An example, (B, 3, h, w), B of at least 2 where it is free.
        dynamic_batch (bool): As in :func:`save_program`. Defaults to False.
        opset (int): Version of the operators. Defaults to 18, and 17 for torch < 2.5.
        dynamic_size (bool): As in :func:`save_program`. Defaults to False.

    Raises:
        UserError: If a package is missing, the file needs other operators, or the model
            cannot be exported so.
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
    axes = _free_axes(dynamic_batch, dynamic_size)
    with (
        torch.no_grad(),
        _naming_operators(),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        # A size that is not free is a constant of the file, and is meant to be.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        if HAS_FREE_SIZES or (HAS_EXPORT and not dynamic_size):
            dims = {
                axis: name if HAS_FREE_SIZES else torch.export.Dim(name)
                for axis, name in axes.items()
            }
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=True,
                external_data=False,
                dynamic_shapes={'images': dims} if dims else None,
                opset_version=opset,
                verbose=False,
                **names,
            )
        else:
            logits = {axis: name for axis, name in axes.items() if axis == 0}
            if dynamic_size and model(images).dim() == 4:
                logits.update({2: 'rows', 3: 'columns'})
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamic_axes={'images': axes, 'logits': logits} if axes else None,
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


def sizes_to_compare(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Four sizes, of four aspect ratios, on which to compare a file for any size.

    The one that is given, two with one side twice as long (half as long where it is
    long, since the work grows with its fourth power), and one that most likely is no
    multiple of a patch.
    """
    height, width = shape
    high, wide = (side // 2 if side >= 256 else 2 * side for side in shape)
    odd = (height + height // 4 + 1, width + 3)
    return [shape, (high, width), (height, wide), odd]


class Difference:
    """How far an exported file's logits are from the model's.

    Attributes:
        largest (float): The largest difference, relative to the largest logit where
            that is above 1; infinite where the shapes differ, nan where a logit is.
        same_top1 (bool): Whether the top-1 class of every image is the same; for
            logits of every pixel, of 999 in 1000, since some pixel is always a tie.
    """

    def __init__(self, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape:
            self.largest, self.same_top1 = float('inf'), False
            return
        unit = float(ours.abs().max().clamp(min=1))
        self.largest = float((ours - theirs).abs().max()) / unit
        same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
        self.same_top1 = float(same) >= (1 if ours.dim() == 2 else 0.999)


def open_file(path: str) -> Optional[Callable[[Tensor], Tensor]]:
    """An exported file as a function from images (B, 3, h, w) to logits (B, ...).

    It raises a UserError for images that the file cannot take.

    Returns:
        Callable | None: None for .onnx where onnxruntime is not installed.
    """
    if path.endswith('.pt2'):
        run = torch.export.load(path).module()
    else:
        try:
            import onnxruntime
        except ImportError:
            return None
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

        def run(images):
            return torch.from_numpy(session.run(None, {'images': images.numpy()})[0])

    def checked(images: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                return run(images)
        except Exception as error:  # any class: onnxruntime's, or a guard's of torch
            raise UserError(
                f'The file cannot take images of {tuple(images.shape)}; it was not kept. '
                f'Try the other format. ({" ".join(str(error).split())[:400]})'
            ) from error

    return checked
