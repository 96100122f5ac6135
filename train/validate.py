"""Validation while training: the loss on held-out samples, and for detectors COCO's mAP on some pictures."""

import argparse
import contextlib
import io
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset

from infer.lib.predictions import predict
from model import PaliGemma
from model.decoding.closed_set import ClosedSet, GroupDecoder
from model.decoding.detections import Selection
from model.decoding.detector import ClosedSetDetector
from model.io.tokenizer import Tokenizer
from train.data.coco import CocoDetections
from train.data.open import open_data
from train.data.samples import collate
from train.measures import category_ids, read_coco, run_cocoeval
from train.practice.write import write_coco
from train.run.options import noise_of
from train.run.processes import gathered, process

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
        self.model, self.objective, self.device = model, objective, device
        self.rank, self.world = process()
        if args.shard:  # every process must run the same layers the same number of times
            self.rank, self.world = 0, 1
        self.dtype = dict(dtype=torch.bfloat16, enabled=args.amp and args.dtype == "float32")
        file, images = args.val, args.val_images
        if file is None:
            self._scenes = tempfile.TemporaryDirectory()  # held until the program ends
            file = Path(self._scenes.name) / "same" / "instances.json"
            write_coco(file.parent, args.val_count, "same", model.config.vision.image_size)
        images = images or file.parent / "images"
        # The noise of the training data, or val_loss would be of other answers; but every picture counts.
        noise = replace(noise_of(args), skip_empty=False)
        data = open_data(file, images, model, tokenizer, args.seed, augment=False, noise=noise)
        keys = [(item, item) for item in range(min(args.val_count, len(data)))][self.rank :: self.world]
        self.loader = DataLoader(
            Keyed(data, keys),
            BATCH,
            collate_fn=partial(collate, pad=model.config.pad, per_example=args.loss_mean == "example"),
        )
        self.detector = None
        if isinstance(data, CocoDetections) and args.shard:
            if process()[0] == 0:
                print("--shard: validation computes val_loss only; for val_mAP, evaluate a checkpoint")
        elif isinstance(data, CocoDetections):
            self.coco, self.images = first_images(read_coco(file), args.val_count), images
            language = ClosedSet.of(model.config, tokenizer)
            self.detector = ClosedSetDetector(GroupDecoder(model, language), Selection(nms_iou=0.5))
            self.ids = category_ids(self.coco, self.detector.classes, file)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """{"val_loss": ..., "val_mAP": ...} of all processes' shares. With --shard no mAP: the decoder
        calls parts of the model by themselves, whose weights FSDP would not put together."""
        self.objective.eval()
        sums = torch.zeros(2, device=self.device)  # losses, weights
        for batch in self.loader:
            batch = {name: x.to(self.device) for name, x in batch.items()}
            patch_head, self.objective.patch_head = self.objective.patch_head, None  # files know no patches
            with torch.autocast(self.device.type, **self.dtype):
                _, loss = self.objective(batch | {"total": torch.ones((), device=self.device)})
            self.objective.patch_head = patch_head
            sums += torch.stack((loss, batch["weights"].sum()))
        if self.world > 1:
            dist.all_reduce(sums)
        figures = {"val_loss": round((sums[0] / sums[1]).item(), 4)}
        if self.detector:
            figures["val_mAP"] = round(self._mean_average_precision(), 4)
        if isinstance(self.objective, FSDPModule):  # without a backward pass its root stays unsharded
            self.objective.reshard()
        self.objective.train()
        return figures

    def _mean_average_precision(self) -> float:
        mine = first_images(self.coco, None, self.rank, self.world)
        results = predict(self.detector, mine, self.images, self.ids, BATCH, "validation")
        results = [result for share in gathered(results) for result in share]
        return max(0.0, float(run_cocoeval(self.coco, results).stats[0]))


class Keyed(Dataset):
    """A data set that is asked for (draw, item), as a list of such keys."""

    def __init__(self, data, keys: list[tuple[int, int]]):
        self.data, self.keys = data, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int):
        return self.data[self.keys[i]]


def first_images(coco: COCO, count: int | None, start: int = 0, step: int = 1) -> COCO:
    """The set cut down to some of its first images in the file, which val_loss is of, too."""
    records = coco.dataset["images"][:count][start::step]
    kept, part = {record["id"] for record in records}, COCO()
    annotations = [a for a in coco.dataset["annotations"] if a["image_id"] in kept]
    part.dataset = dict(images=records, annotations=annotations, categories=coco.dataset["categories"])
    with contextlib.redirect_stdout(io.StringIO()):
        part.createIndex()
    return part
