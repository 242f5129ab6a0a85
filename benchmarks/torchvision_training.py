"""Training of the same detector as it is usually written, from the parts of torchvision and its reference scripts.

A DataLoader reads images with PIL and torchvision.transforms.v2. The network has the same layers, in NCHW. The loss is
torchvision's own, with matching and sorting. Everything runs eagerly, under DistributedDataParallel.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.models.detection import _utils as detection
from torchvision.models.detection import ssd
from torchvision.ops import box_iou
from torchvision.transforms import v2

from dali_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Augmentation, LabelledImages
from kernels.boxes import cxcywh_to_ltrb
from kernels.constants import CENTRE_VARIANCE, NEGATIVES_PER_POSITIVE, SIZE_VARIANCE
from ssd_fast.config.sections import OptimizerConfig
from ssd_fast.model.ssd import SSD

PREFETCHED_PER_WORKER = 2  # batches; the DataLoader's default
_BOXES_PER_IMAGE = 8  # of synthetic batches; COCO has 7.3


class PeerBatch(NamedTuple):
    """images: [B, 3, S, S] float32, normalised. boxes_ltrb: B tensors [G, 4], pixels. labels: B tensors [G] int64."""

    images: Tensor
    boxes_ltrb: list[Tensor]
    labels: list[Tensor]

    def to(self, device: torch.device) -> "PeerBatch":
        images, boxes_ltrb, labels = self
        lists = ([tensor.to(device, non_blocking=True) for tensor in tensors] for tensors in (boxes_ltrb, labels))
        return PeerBatch(images.to(device, non_blocking=True), *lists)


class PeerDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Augmented images of a set, without the images that have no boxes."""

    def __init__(self, images: LabelledImages, augmentation: Augmentation, image_size: int) -> None:
        self._images = images
        self._with_boxes = np.flatnonzero(np.diff(images.offsets))
        # Differences to our pipeline: an option's IoU must hold for one box of the image, ours for all. The range of
        # aspects is one of pixels, ours of fractions. Colours change in random order, by the rules of ColorJitter.
        # Images stay in PIL's form until the end because that is faster: at 300 x 300 two passes over 200 photographs
        # of COCO on one core of an AMD EPYC gave 64 and 78 images a second; with tensors from the start, 56 and 58.
        hue = augmentation.hue_degrees / 360
        self._transforms = v2.Compose(
            [
                v2.RandomIoUCrop(
                    *augmentation.crop_sides,
                    *augmentation.crop_aspect,
                    sampler_options=[*augmentation.crop_min_ious, *([1.0] if augmentation.crop_allow_none else [])],
                    trials=augmentation.crop_attempts,
                ),
                v2.Resize((image_size, image_size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
                v2.ColorJitter(augmentation.brightness, augmentation.contrast, augmentation.saturation, (-hue, hue)),
                v2.RandomHorizontalFlip(augmentation.flip_probability),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                v2.SanitizeBoundingBoxes(),  # drops boxes whose centre was cut off, as ours, and those below a pixel
            ]
        )

    def __len__(self) -> int:
        return len(self._with_boxes)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        index = self._with_boxes[position]
        truths = slice(self._images.offsets[index], self._images.offsets[index + 1])
        with Image.open(self._images.image_dir / self._images.file_names[index]) as stored:
            image = stored.convert("RGB")
        boxes_ltrb = torch.from_numpy(self._images.boxes_ltrb[truths])
        boxes = tv_tensors.BoundingBoxes(boxes_ltrb, format="XYXY", canvas_size=(image.height, image.width))
        labels = torch.from_numpy(self._images.labels[truths]).long()
        image, target = self._transforms(image, {"boxes": boxes, "labels": labels})
        return image.as_subclass(Tensor), target["boxes"].as_subclass(Tensor), target["labels"]


def make_peer_loader(dataset: PeerDataset, batch_size: int, num_workers: int, *, pin_memory: bool) -> DataLoader:
    """Return a loader of batches in random order, without the pause of a DataLoader between epochs."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=RandomSampler(dataset, num_samples=10**9),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        persistent_workers=True,
        prefetch_factor=PREFETCHED_PER_WORKER,
    )


def synthetic_peer_batch(images: Tensor, num_classes: int, seed: int) -> PeerBatch:
    """Return our images as a batch of the peer, with random boxes of 0.1 to 0.6 of a side."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = (len(images), _BOXES_PER_IMAGE), images.shape[-1]
    sides = (0.1 + 0.5 * torch.rand(*shape, 2, generator=generator)) * size
    corners = torch.rand(*shape, 2, generator=generator) * (size - sides)
    labels = torch.randint(1, num_classes + 1, shape, generator=generator)
    boxes_ltrb = torch.cat((corners, corners + sides), dim=-1)
    return PeerBatch(images.float().contiguous(), list(boxes_ltrb), list(labels)).to(images.device)


class PeerTrainer:
    """Network, loss and optimizer. Needs torch's process group."""

    # torchvision's own loss, and the attributes of its detector that it reads.
    compute_loss = ssd.SSD.compute_loss
    box_coder = detection.BoxCoder(weights=(1 / CENTRE_VARIANCE,) * 2 + (1 / SIZE_VARIANCE,) * 2)
    neg_to_pos_ratio = float(NEGATIVES_PER_POSITIVE)

    def __init__(
        self, model: SSD, config: OptimizerConfig, anchors_cxcywh: Tensor, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """model: in NCHW. dtype: of autocast, or float32 for none."""
        self._device, self._dtype = device, dtype
        self._anchors_ltrb = cxcywh_to_ltrb(anchors_cxcywh).to(device) * model.config.image_size
        self._matcher = detection.SSDMatcher(0.5)
        self._model = DistributedDataParallel(model.to(device).train())
        self._clip_norm = config.clip_norm
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def loss(self, batch: PeerBatch) -> Tensor:
        """Sum of box and class loss, divided by the positives of the whole batch (ours: image by image)."""
        deltas, logits = self._model(batch.images)
        boxes_and_labels = zip(batch.boxes_ltrb, batch.labels, strict=True)
        targets = [{"boxes": boxes_ltrb, "labels": labels} for boxes_ltrb, labels in boxes_and_labels]
        matches = [self._match(boxes_ltrb) for boxes_ltrb in batch.boxes_ltrb]
        outputs = {"bbox_regression": deltas, "cls_logits": logits}
        parts = self.compute_loss(targets, outputs, [self._anchors_ltrb] * len(targets), matches)
        return parts["bbox_regression"] + parts["classification"]

    def train_step(self, batch: PeerBatch, learning_rate: float) -> None:
        """Train on one batch. The loss is not read; torchvision's references read it, and so wait, at each step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            loss = self.loss(batch)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        if self._clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _match(self, boxes_ltrb: Tensor) -> Tensor:
        """[A] int64, the box of every anchor, or a negative number; as in torchvision's SSD."""
        if len(boxes_ltrb) == 0:
            return torch.full((len(self._anchors_ltrb),), -1, device=self._device)
        return self._matcher(box_iou(boxes_ltrb, self._anchors_ltrb))


def _collate(samples: list[tuple[Tensor, Tensor, Tensor]]) -> PeerBatch:
    images, boxes_ltrb, labels = zip(*samples, strict=True)
    return PeerBatch(torch.stack(images), list(boxes_ltrb), list(labels))
