"""PaliGemma 1 and 2 from scratch: `from model import PaliGemma`."""

from model.paligemma import PaliGemma

__all__ = ["PaliGemma"]
