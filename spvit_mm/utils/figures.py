"""What the pictures have in common."""

import numpy as np


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
