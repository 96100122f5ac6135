"""Train nano's mask codec on the masks of practice scenes and on random shapes.

    python train/nano/codec.py --out runs/codec --steps 8000

Writes OUT/codec.safetensors and prints the mean IoU between held-out masks and their reconstructions. The
recipe is that of AiT (arXiv 2301.02229): squared error in [-1, 1], codes that are moving means of their
features, a commitment loss of 0.25, straight-through gradients.

Axes: n masks, W width of a code.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.decoding.masks import SIDE, MaskCodec, crop, mask_iou
from model.io.hub import CODEC
from model.io.tokenizer import SEGS
from train.practice.scenes import make_scene
from train.practice.write import HELD_OUT_SETS
from train.run.program import not_negative, parser, positive, run

DECAY = 0.99  # of the codebook's moving sums
COMMITMENT = 0.25  # weight of the loss that pulls features towards their codes
SCENES_PER_STEP = 24
SHAPES_PER_MASK = 1 / 3  # random shapes of a step, for each mask of its scenes
MIN_USES = 0.05  # mean uses a step: a code with fewer is replaced by a feature of the batch


def random_shape(rng: np.random.Generator) -> np.ndarray:
    """An ellipse, or a polygon or star with a random number of corners: bool [64, 64], touching all sides."""
    corners = int(rng.integers(3, 13))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = rng.uniform(0.3, 1, corners) if rng.random() < 0.7 else np.ones(corners)
    points = np.stack((np.cos(angles), np.sin(angles)), 1) * radii[:, None]
    low, high = points.min(0), points.max(0)
    points = (points - low) / np.maximum(high - low, 1e-6) * (SIDE - 1)
    canvas = Image.new("1", (SIDE, SIDE))
    draw = ImageDraw.Draw(canvas)
    if rng.random() < 0.2:
        draw.ellipse((0, 0, SIDE - 1, SIDE - 1), fill=1)
    else:
        draw.polygon([tuple(point) for point in points.tolist()], fill=1)
    if rng.random() < 0.3:  # something hides a part of it
        x, y = rng.integers(0, SIDE, 2).tolist()
        draw.ellipse((x - 16, y - 16, x + 16, y + 16), fill=0)
    return np.asarray(canvas)


def scene_masks(seed: int, split: str = "train") -> list[np.ndarray]:
    """The masks of a practice scene's objects, each float32 [64, 64] in [-1, 1]."""
    scene = make_scene(seed, split=split)
    return [crop(scene.owner == k, box) for k, box in enumerate(scene.boxes)]


class Masks(Dataset):
    """An item is the masks that a step is trained on, float32 [n, 64, 64]; n varies."""

    def __init__(self, steps: int):
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng([step, 7])
        masks = [mask for i in range(SCENES_PER_STEP) for mask in scene_masks(step * SCENES_PER_STEP + i)]
        masks += [random_shape(rng) * np.float32(2) - 1 for _ in range(round(len(masks) * SHAPES_PER_MASK))]
        return torch.from_numpy(np.stack(masks))


class Codebook:
    """Keeps moving sums of the features nearest to each code; the code is their mean."""

    def __init__(self, codec: MaskCodec):
        self.codec = codec
        self.count, self.sum = torch.ones(SEGS), codec.codebook.clone()

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """features [n, W] and the nearest code [n] of each."""
        one_hot = F.one_hot(codes, SEGS).to(features.dtype)
        self.count.lerp_(one_hot.sum(0), 1 - DECAY)
        self.sum.lerp_(one_hot.T @ features, 1 - DECAY)
        unused = self.count < MIN_USES
        drawn = torch.randint(len(features), (int(unused.sum()),), generator=generator)
        self.sum[unused], self.count[unused] = features[drawn], 1.0
        self.codec.codebook.copy_(self.sum / self.count[:, None])


def mean_iou(codec: MaskCodec, masks: Tensor) -> float:
    """Mean IoU between masks [n, 64, 64] and their reconstructions from codes."""
    return mask_iou(masks > 0, codec.decode(codec.encode(masks)) > 0).mean().item()


def main(argv=None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--out", type=Path, required=True)
    add("--steps", type=positive, default=8000, help=f"of {SCENES_PER_STEP} scenes")
    add("--held-out", type=positive, default=300, help="scenes of each held-out set, for the mean IoU")
    add("--channels", type=positive, default=64, help="a multiple of 8; the official codec has 128")
    add("--width", type=positive, default=128, help="of a code; the official codec has 512")
    add("--lr", type=float, default=1e-3)
    add("--workers", type=not_negative, default=1)
    add("--seed", type=not_negative, default=0)
    args = options.parse_args(argv)
    if args.channels % 8:
        raise ValueError(f"--channels {args.channels}: must be a multiple of 8")
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    codec = MaskCodec(args.channels, args.width).to(memory_format=torch.channels_last)  # twice as fast
    optimizer = torch.optim.AdamW(codec.parameters(), lr=args.lr, weight_decay=0.0)
    loader = DataLoader(Masks(args.steps), batch_size=None, num_workers=args.workers)
    bar = tqdm(loader, unit="step")
    for step, masks in enumerate(bar):
        for group in optimizer.param_groups:  # 100 steps of warm-up, then half a cosine to 0
            group["lr"] = args.lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        features = codec.features(masks)  # [n, 16, W]
        if step == 0:  # codes start as features of the first batch
            first = features.detach().flatten(0, 1)
            codec.codebook.copy_(first[torch.randperm(len(first), generator=generator)[:SEGS]])
            codebook = Codebook(codec)
        codes = codec.nearest(features.detach())  # [n, 16]
        quantised = codec.codebook[codes]
        # Straight-through: the decoder reads the codes, its gradient goes to the features.
        straight = features + (quantised - features).detach()
        error = F.mse_loss(codec.reconstruct(straight), masks)
        loss = error + COMMITMENT * F.mse_loss(features, quantised)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        codebook.update(features.detach().flatten(0, 1), codes.flatten(), generator)
        if step % 50 == 0:
            bar.set_postfix(error=f"{error.item():.4f}", codes=codes.unique().numel())

    codec.save(args.out / CODEC)
    codec = MaskCodec.load(args.out / CODEC)  # in bfloat16, as it is stored
    for split in HELD_OUT_SETS:
        masks = np.stack([mask for seed in range(args.held_out) for mask in scene_masks(seed, split)])
        print(f"{split:<8} {len(masks)} masks, mean IoU {mean_iou(codec, torch.from_numpy(masks)):.3f}")


if __name__ == "__main__":
    run(main, __file__)
