"""Validation while training: the loss on held-out samples, and for detectors COCO's mAP on the same ones."""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset

from model import PaliGemma
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector, closed_set_decoder
from model.io.image import to_network
from model.io.tokenizer import Tokenizer
from train.collapse import collapse_of_set
from train.data.coco import CocoDetections
from train.data.open import open_data
from train.data.samples import weight_of
from train.measures import make_coco, run_cocoeval, to_results
from train.practice.write import write_coco
from train.run.options import branches_of, collate_of, noise_of
from train.run.pictures import pictures_to_skip
from train.run.processes import all_gather, rank_and_world

BATCH = 16


class Validation:
    """The data is opened once; `run` may be called after any step, by all processes together."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: PaliGemma,
        objective: nn.Module,
        tokenizer: Tokenizer,
        device: torch.device,
    ):
        self.objective, self.device = objective, device
        # Under FSDP all processes must run every layer equally often, so each of them takes all samples.
        rank, self.world = (0, 1) if args.shard else rank_and_world()
        self.amp = args.amp and args.dtype == "float32"
        file, images = args.val, args.val_images
        if file is None:
            self._scenes = tempfile.TemporaryDirectory()  # held until the program ends
            file = Path(self._scenes.name) / "instances.json"
            write_coco(file.parent, args.val_count, "development", model.config.vision.image_size)
        # Noise as in training, or val_loss would be about other answers; but no picture is left out.
        noise = replace(noise_of(args), skip_empty=False)
        branches = branches_of(args)
        self.data = open_data(
            file, images, model, tokenizer, args.seed, noise=noise, branches=branches, part="val"
        )
        items = range(min(args.val_count, len(self.data)))
        self.skipped = {}  # {item: what is wrong with its picture}
        if args.val and args.check:
            self.skipped = pictures_to_skip(self.data, items, file, args.workers, args.skip_broken)
            items = [item for item in items if str(item) not in self.skipped]
        self.mine = items[rank :: self.world]
        self.loader = DataLoader(
            Subset(self.data, [(item, item) for item in self.mine]),  # keys (draw, item)
            BATCH,
            collate_fn=collate_of(args, self.data.closed_set, model.config.pad),
        )
        self.detector = None
        if self.data.closed_set and args.shard and rank_and_world()[0] == 0:
            print("--shard: validation computes val_loss only; for val_mAP, evaluate a checkpoint")
        if self.data.closed_set and not args.shard:
            decoder = closed_set_decoder(model, args.answers)
            self.detector = ClosedSetDetector(decoder, Selection(nms_iou=0.5))
            self.truth = truth_of(self.data, items)

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float], str]:
        """({"val_loss": ..., "val_mAP": ...}, a warning or "") of all processes' shares together. No mAP with
        --shard: decoding calls parts of the model directly, and FSDP gathers weights only when the whole
        objective is called."""
        self.objective.eval()
        # Files do not say what each patch shows, so there is nothing to measure the helper head against.
        patch_head, self.objective.patch_head = self.objective.patch_head, None
        sums = torch.zeros(2, device=self.device)  # losses, weights
        results, items = [], iter(self.mine)
        for batch in self.loader:
            batch = {name: x.to(self.device) for name, x in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                _, loss = self.objective(batch | {"total": torch.ones((), device=self.device)})
            sums += torch.stack((loss, weight_of(batch)))
            if self.detector:
                results += self._detect(batch["image"], items)
        self.objective.patch_head = patch_head
        if self.detector:
            self.detector.decode.release()  # training needs the room
        if self.world > 1:
            dist.all_reduce(sums)
        figures, warning = {"val_loss": round((sums[0] / sums[1].clamp(min=1e-6)).item(), 4)}, ""
        if self.detector:
            results = [result for share in all_gather(results) for result in share]
            figures["val_mAP"] = round(max(0.0, float(run_cocoeval(self.truth, results).stats[0])), 4)
            warning = collapse_of_set(self.truth, results)
        if isinstance(self.objective, FSDPModule):  # without a backward pass its root stays unsharded
            self.objective.reshard()
        self.objective.train()
        return figures, warning

    def _detect(self, images: Tensor, items: Iterator[int]) -> list[dict]:
        """What is found in a batch of images uint8 [B, S, S, 3], the next B items, in COCO's format."""
        items = list(islice(items, len(images)))
        sizes = [self.data.picture_size(item) for item in items]
        answer = self.detector.decode(to_network(images))
        ids = range(len(self.detector.classes))  # those of truth_of
        found = zip(items, self.detector.select(answer, sizes), strict=True)
        return [result for item, of_image in found for result in to_results(of_image, item, ids)]


def truth_of(data: CocoDetections, items: Iterable[int]) -> COCO:
    """The objects of some samples for pycocotools: images by item, categories by the model's class numbers.
    Crowds are not among them, so they do not count."""
    images, annotations = [], []
    for item in items:
        width, height = data.picture_size(item)
        images.append(dict(id=item, width=width, height=height))
        for (x0, y0, x1, y1), label in zip(*data.objects(item)):
            box, number = [x0, y0, x1 - x0, y1 - y0], len(annotations) + 1  # pycocotools: 0 is "no match"
            area = dict(area=box[2] * box[3], iscrowd=0)
            annotations.append(dict(id=number, image_id=item, category_id=int(label), bbox=box) | area)
    categories = [dict(id=label, name=name) for label, name in enumerate(data.language.classes)]
    return make_coco(images, annotations, categories)
