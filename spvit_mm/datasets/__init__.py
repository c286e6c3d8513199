"""Data sets that need no download, and the transforms of our recipes."""

from .digits import Digits

__all__ = ['Digits']
