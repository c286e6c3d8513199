import os.path as osp
from collections.abc import Sequence

from mmengine.fileio import join_path
from mmpretrain.engine import VisualizationHook
from mmpretrain.registry import HOOKS
from mmpretrain.structures import DataSample

from ...utils import unwrap_model

# In pixels; mmpretrain's text is made for images of this size.
SHORT_EDGE = 224


@HOOKS.register_module()
class ClsVisualizationHook(VisualizationHook):
    """mmpretrain's VisualizationHook, with a picture of its own for every image.

    mmpretrain names a picture after the file alone, so that ``dog/0.jpg`` overwrites
    ``cat/0.jpg``. Here it is named after the last folder and the file:
    ``cat_0_<step>.png``. An image without a path, and one whose name is taken, is told
    by its number in the data, from 0. Images that the model's preprocessor turns from
    BGR to RGB are drawn in their true colors. Small images are enlarged, since the text
    on them has a size of its own.

    In a distributed run the first process draws its share, as in mmpretrain.

    Args:
        enable (bool): Whether anything is drawn. Defaults to False.
        interval (int): Every how many images one is drawn. Defaults to 5000.
        show (bool): Whether it is shown in a window. Defaults to False.
        out_dir (str, optional): Folder of the pictures. Defaults to None: they go to
            the visualizer's backends.
        **kwargs: Other arguments of
            :meth:`mmpretrain.visualization.UniversalVisualizer.visualize_cls`.
    """

    def before_val_epoch(self, runner) -> None:
        model = unwrap_model(runner.model)
        self._is_bgr = getattr(model.data_preprocessor, 'to_rgb', False)
        self._seen = 0
        self._names = set()

    before_test_epoch = before_val_epoch

    def _draw_samples(
        self,
        batch_idx: int,
        data_batch: dict,
        data_samples: Sequence[DataSample],
        step: int = 0,
    ) -> None:
        if not self.enable:
            return
        # Counted, since the last batch can be shorter than batch_idx tells.
        for image, sample in zip(data_batch['inputs'], data_samples, strict=True):
            if self._seen % self.interval == 0:
                self._draw(image, sample, step)
            self._seen += 1

    def _draw(self, image, sample: DataSample, step: int) -> None:
        if self._is_bgr and image.shape[0] == 3:
            image = image.flip(0)
        name = self._name(sample)
        draw_args = dict(self.draw_args)
        if min(image.shape[1:]) < SHORT_EDGE and 'rescale_factor' not in draw_args:
            draw_args.setdefault('resize', SHORT_EDGE)
        if self.out_dir is not None:
            draw_args['out_file'] = join_path(self.out_dir, f'{name}_{step}.png')
        self._visualizer.visualize_cls(
            image=image.permute(1, 2, 0).cpu().numpy().astype('uint8'),
            data_sample=sample,
            step=step,
            name=name,
            **draw_args,
        )

    def _name(self, sample: DataSample) -> str:
        """A name that no other image of this pass has."""
        name = str(self._seen)
        if sample.get('img_path'):
            folder, file = osp.split(sample.get('img_path'))
            parts = (osp.basename(folder), osp.splitext(file)[0])
            name = '_'.join(part for part in parts if part)
        while name in self._names:
            name = f'{name}_{self._seen}'
        self._names.add(name)
        return name
