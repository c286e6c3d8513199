"""What the pictures have in common."""

import numpy as np

from .errors import UserError
from .files import whole_file

# matplotlib draws no picture of this side or more.
TOO_LARGE = 2**16


def new_figure(width, height):
    """A matplotlib figure (inches) without any window behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def figure_to_image(figure, dpi=100):
    """Render a figure to an RGB image.

    Returns:
        np.ndarray: (height, width, 3), uint8.
    """
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure, path, dpi):
    """Write a figure as a whole or not at all.

    Args:
        figure (matplotlib.figure.Figure): The figure.
        path (str): The file.
        dpi (int): Pixels per inch.

    Raises:
        UserError: For a picture too large to draw, or a file that cannot be written.
    """
    width, height = (round(inches * dpi) for inches in figure.get_size_inches())
    if max(width, height) >= TOO_LARGE:
        raise UserError(
            f'{path} would be {width} x {height} pixels, and a picture has less than '
            f'{TOO_LARGE} on a side. Show fewer at a time.'
        )
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi)
