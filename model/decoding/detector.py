"""Detection in images: `Detector` is what most users need.

    detector = Detector.from_pretrained("nano")
    print(detector("photo.jpg"))                                    # a file, a PIL image, or a list of them
    print(detector("photo.jpg", classes=["cat", "traffic light"]))  # open-set: the classes that you name
    print(detector("photo.jpg", classes=["cat"], masks=True))       # and their masks

`ClosedSetDetector` and `OpenSetDetector` (open_set.py) do the work, a batch at a time. Programs with options
of their own use these two.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from model.config import FORMS, MAX_GROUPS
from model.decoding.batches import fitting_batch, network_images
from model.decoding.closed_set import GROUP, Answer, ClosedSet, GroupDecoder, Head
from model.decoding.detections import KEEP_ALL, Detections, Selection
from model.decoding.generate import Prompter
from model.decoding.masks import MaskCodec
from model.decoding.open_set import CLASSES_PER_PROMPT, MAX_ANSWER_TOKENS, OpenSetDetector, class_names
from model.decoding.packing import load_for_decoding
from model.decoding.parallel import ParallelDecoder
from model.decoding.photographs import are_photographs, photograph_warning
from model.io.hub import codec_file
from model.io.image import load_image
from model.paligemma import PaliGemma


def head_for(model: PaliGemma) -> type:
    """The fused head on a GPU that has Triton (Windows has none), the plain one elsewhere."""
    if model.projector.weight.is_cuda and find_spec("triton"):
        from model.decoding.head_kernel import FusedHead  # here, as Triton may be missing

        return FusedHead
    return Head


def closed_set_decoder(
    model: PaliGemma, decode: str | None = None, branches: int | None = None, **options
) -> GroupDecoder | ParallelDecoder:
    """The decoder of the model's closed-set language.

    decode: "sequence" for one box after the other, "parallel" for all in five steps; None: as the checkpoint
    was taught. branches: boxes in parallel; None: as the config says. options: of the decoder's constructor.
    """
    decode = decode or model.config.answers
    if decode not in FORMS:
        raise ValueError(f"decode={decode!r}: must be one of {', '.join(map(repr, FORMS))}")
    if branches is not None and decode != "parallel":
        raise ValueError(f'branches={branches} is for decode="parallel"')
    for name, count in dict(branches=branches, groups=options.get("groups")).items():
        if count is not None and not 1 <= count <= MAX_GROUPS:  # the cache is allocated for all of them
            raise ValueError(f"{name}={count}: must be at least 1, at most {MAX_GROUPS:,}")
    language, head = ClosedSet.of(model.config, model.tokenizer), head_for(model)
    if decode == "parallel":
        return ParallelDecoder(model, language, branches, head=head, **options)
    return GroupDecoder(model, language, head=head, **options)


class ClosedSetDetector:
    """Detects the classes that the checkpoint was trained on: "detect all classes" (closed_set.py)."""

    def __init__(
        self, decode: GroupDecoder | ParallelDecoder, selection: Selection = KEEP_ALL, mirror: bool = False
    ):
        """mirror: read the mirror image of every image, too, and take the boxes of both (test-time
        augmentation): more exact, in twice the time."""
        self.decode, self.model, self.selection, self.mirror = decode, decode.model, selection, mirror
        self.classes = decode.language.classes

    def __call__(self, images: list[Image.Image]) -> list[Detections]:
        """Detect in a batch of upright RGB images of any sizes."""
        pixels = network_images(self.model, images)
        answer = self.decode(pixels)
        photographs = are_photographs(self.model, len(images))
        if self.mirror:
            answer += self.decode(pixels.flip(-1)).mirrored(self.decode.language.loc0)
        return self.select(answer, [image.size for image in images], photographs)

    def select(
        self, answer: Answer, sizes: list[tuple[int, int]], photographs: list[bool] | None = None
    ) -> list[Detections]:
        """What is kept of the answer to a batch of images, given their widths and heights."""
        columns = answer.locs, answer.scores, answer.labels, answer.tokens, answer.live
        photographs = photographs or [False] * len(sizes)
        rows = zip(sizes, photographs, *(column.cpu().numpy() for column in columns), strict=True)
        return [
            self.selection(
                size,
                self.classes,
                locs=locs[live],
                scores=scores[live],
                class_ids=labels[live],
                tokens=tokens,
                photograph=photograph,
            )
            for size, photograph, locs, scores, labels, tokens, live in rows
        ]

    def fitting_batch(self) -> int:
        """How many images to detect in at a time."""
        boxes = self.decode.groups
        rows = boxes if isinstance(self.decode, ParallelDecoder) else 1
        return fitting_batch(self.model, len(self.decode.language.prompt), GROUP * boxes, rows)


class Detector:
    """Finds objects in images: of the checkpoint's own classes, or of those you name."""

    def __init__(
        self,
        model: PaliGemma,
        selection: Selection = KEEP_ALL,
        decode: str | None = None,
        branches: int | None = None,
        mirror: bool = False,
    ):
        """decode, branches, mirror: how the model's own classes are decoded, see closed_set_decoder and
        ClosedSetDetector."""
        self.model, self.selection = model, selection
        self.closed_set = ClosedSetDetector(closed_set_decoder(model, decode, branches), selection, mirror)
        self.prompter = Prompter(model, MAX_ANSWER_TOKENS)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "nano",
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        int8: bool = False,
        score_threshold: float = 0.6,
        nms_iou: float = 0.5,
        min_size: float = 0.0,
        decode: str | None = None,
        branches: int | None = None,
        mirror: bool = False,
        **config_overrides,
    ) -> "Detector":
        """Load a folder, a hub id ("owner/name" or "owner/name@revision"), or the shipped "nano".

        dtype, int8: see load_for_decoding. device: None for a GPU if there is one. score_threshold, nms_iou,
        min_size: which objects are kept, see Selection. decode, branches: see closed_set_decoder; mirror:
        see ClosedSetDetector. config_overrides: see PaliGemma.from_pretrained.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_for_decoding(
            source, dtype=dtype, device=device, adapter=adapter, int8=int8, **config_overrides
        )
        return cls(model, Selection(score_threshold, nms_iou, min_size), decode, branches, mirror)

    @property
    def classes(self) -> tuple[str, ...]:
        """The checkpoint's own classes, which class_ids index unless others are named."""
        return self.closed_set.classes

    @cached_property
    def codec(self) -> MaskCodec:
        """The mask codec beside the checkpoint, read when it is first needed."""
        return MaskCodec.load(codec_file(self.model.folder))

    def __call__(
        self,
        images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
        classes: str | Sequence[str] | None = None,
        masks: bool = False,
    ) -> Detections | list[Detections]:
        """Detect in a file or a PIL image of any size, or in each of a list of them.

        classes: names, or "all" for the checkpoint's own, to be asked for in words (open-set); None for
        closed-set detection. masks: segment the named classes, too.
        """
        if masks and classes is None:
            raise ValueError('masks=True needs the names of classes, such as classes=["cat"]')
        detect = self.closed_set if classes is None else self._open_set(classes, masks)
        single = images is None or isinstance(images, str | Path | Image.Image)  # None: load_image refuses it
        images, size, found = [images] if single else list(images), detect.fitting_batch(), []
        for start in range(0, len(images), size):
            found += detect([load_image(image) for image in images[start : start + size]])
        names = [image if isinstance(image, str | Path) else "a picture" for image in images]
        if photographs := [name for name, one in zip(names, found, strict=True) if one.photograph]:
            warnings.warn(photograph_warning(photographs, len(images)), stacklevel=2)
        return found[0] if single else found

    def _open_set(self, classes: str | Sequence[str], masks: bool) -> OpenSetDetector:
        return OpenSetDetector(
            self.prompter,
            class_names(classes, self.model.config),
            per_prompt=1 if masks else CLASSES_PER_PROMPT,
            selection=self.selection,
            codec=self.codec if masks else None,
        )
