"""Warnings about photographs for a checkpoint that has only seen drawings, such as nano.

In photographs it finds objects too, with high scores, but wrong ones. A linear test on the mean of a
picture's image tokens tells photographs from practice scenes; train/nano/photographs.py fits it. The test
belongs to these weights alone: no checkpoint that is fine-tuned, merged or saved from them takes it along.

Axes: B batch, P image tokens, D decoder width.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from model.io.hub import PHOTOGRAPHS
from model.io.names import shown
from model.io.tensors import read_tensors
from model.paligemma import PaliGemma


class PhotographTest:
    """A forward hook on a model's projector, which looks at the image tokens of every batch."""

    def __init__(self, weight: Tensor, bias: Tensor):
        """A picture whose mean token m [D] has weight @ m + bias > 0 is a photograph."""
        self.weight, self.bias = weight, bias
        self.latest: Tensor | None = None  # bool [B], of the batch that was encoded last

    def __call__(self, _module, _inputs, image_tokens: Tensor) -> None:
        mean = image_tokens.detach().float().mean(1)  # [B, D]
        self.latest = mean @ self.weight.to(mean.device) + self.bias.to(mean.device) > 0


def add_photograph_test(model: PaliGemma) -> None:
    """Test every picture that the model encodes, if its folder has a test for its weights."""
    if model.folder is None or not (file := model.folder / PHOTOGRAPHS).exists():
        return
    tensors, width = read_tensors(file), model.config.text.width
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != dict(weight=[width], bias=[]):
        raise ValueError(f"{file} is of another checkpoint: it must hold weight [{width}] and a bias")
    model.photograph_test = PhotographTest(tensors["weight"].float(), tensors["bias"].float())
    model.projector.register_forward_hook(model.photograph_test)


def are_photographs(model: PaliGemma, count: int) -> list[bool]:
    """Whether each of the `count` pictures that the model encoded last looks like a photograph. All False if
    the model has no test."""
    test = model.photograph_test
    return test.latest.tolist() if test else [False] * count


def photograph_warning(photographs: Sequence[Path | str], pictures: int) -> str:
    """The warning about these files, at least one, out of `pictures` that were looked at."""
    first, others = shown(photographs[0]), len(photographs) - 1
    which = f"{first} looks like a photograph"
    if others:
        which = f"{first} and {others} more of {pictures} pictures look like photographs"
    return (
        f"{which}, and this model knows drawings only: what it finds there means little. For them, "
        'detect.py takes --model google/paligemma2-3b-mix-448 --classes "person ; bicycle" (README.md)'
    )
