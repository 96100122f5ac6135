"""PaliGemma 1 and 2 from scratch: `from model import Detector, PaliGemma`."""

from model.decoding.detector import Detector
from model.paligemma import PaliGemma

__all__ = ["Detector", "PaliGemma"]
