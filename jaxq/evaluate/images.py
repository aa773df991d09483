"""Images to evaluate on: read, made into what a checkpoint's own image processor makes of them, classified."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.evaluate.accuracy import Accuracy, accuracy
from jaxq.evaluate.batches import in_order
from jaxq.models import Model

# What transformers' processors take for granted.
VIT = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 224, "width": 224},
}
DEIT = VIT | {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "size": {"height": 256, "width": 256},
}


def read_images(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 ``[n, h, w]`` or ``[n, h, w, 3]``, and their labels, int ``[n]``, from an npz file.

    Raises FileNotFoundError, or ValueError if the file is no npz, lacks one of the two, or they are something else.
    Nothing is unpickled.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}; what is read has `images` and `labels`") from error
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file of plain arrays ({error})") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or 0 in images.shape:
        raise ValueError(
            f"{path}: images are {images.dtype} {list(images.shape)}; what is read are uint8 [n, h, w] or [n, h, w, 3]"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}; {len(images)} images have integers "
            f"[{len(images)}]"
        )
    return images, labels.astype(np.int64)


def preprocess(images: np.ndarray, model: Model) -> np.ndarray:
    """uint8 ``[n, h, w]`` or ``[n, h, w, 3]`` -> what the model reads, float32 ``[n, H, W, C]``.

    As transformers' PIL processors for ViT and DeiT do it: resized, cropped at the center, rescaled, normalized, each
    as the checkpoint's ``preprocessor_config.json`` says; a grey image has its one channel C times.
    Raises ValueError if the model reads text or has no such file, and for images that do not come out in its size.
    """
    if model.pixels is None:
        raise ValueError(f"{model.name} reads text, not images")
    if model.preprocessor is None:
        raise ValueError(f"{model.name}: no preprocessor_config.json in it, so images cannot be read for it")
    settings = _settings(model.preprocessor)
    channels = model.pixels[-1]
    if images.ndim == 3:
        images = np.repeat(images[..., None], channels, axis=-1)
    if settings["do_resize"]:
        images = _resize(images, _size(settings, "size"), settings["resample"])
    if settings["do_center_crop"]:
        images = _crop(images, _size(settings, "crop_size"))
    if images.shape[1:] != model.pixels:
        raise ValueError(
            f"preprocessed images are {list(images.shape[1:])}, {model.name} reads {list(model.pixels)}: give images "
            "of that size, or a preprocessor_config.json that resizes to it"
        )
    pixels = images.astype(np.float32)
    if settings["do_rescale"]:
        pixels *= np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        mean, std = (_statistic(settings, key, channels) for key in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    return pixels


def classify_images(
    forward: Callable[..., jax.Array],
    params: Any,
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 8,
    progress: bool = False,
) -> Accuracy:
    """Accuracy of ``forward(params, pixels) -> logits`` on images, preprocessed as ``model`` reads them.

    One shape is compiled.

    Raises ValueError as ``preprocess`` and ``accuracy`` do.
    """
    batches = ((rows, (preprocess(images[rows], model),)) for rows in in_order(len(images), batch_size))
    return accuracy(forward, params, batches, labels, progress)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or "ViT"
    if not name.startswith(("ViT", "DeiT")):
        raise ValueError(f"preprocessor_config.json: {name} is not supported; supported: those of ViT and DeiT")
    return (DEIT if name.startswith("DeiT") else VIT) | config


def _size(settings: dict[str, Any], key: str) -> tuple[int, int]:
    """Height and width: a number is both."""
    match settings.get(key):
        case int(both):
            return both, both
        case {"height": int(height), "width": int(width)}:
            return height, width
        case other:
            raise ValueError(f"preprocessor_config.json: {key} {other} is not supported; give a height and a width")


def _statistic(settings: dict[str, Any], key: str, channels: int) -> np.ndarray:
    try:
        values = np.asarray(settings[key], np.float32)
    except (TypeError, ValueError):  # not even numbers
        values = np.zeros(0)
    if values.shape not in ((), (1,), (channels,)):
        raise ValueError(f"preprocessor_config.json: {key} {settings[key]!r} does not fit {channels} channels")
    return np.broadcast_to(values, (1, 1, 1, channels))


def _resize(images: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    if images.shape[1:3] == size:
        return images
    from PIL import Image  # not needed by a model of text

    if resample not in range(6):
        raise ValueError(
            f"preprocessor_config.json: resample {resample!r} is not supported; give 0 to 5, as Pillow has"
        )
    height, width = size

    def one(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return np.asarray(picture.resize((width, height), Image.Resampling(resample))).reshape(height, width, -1)

    return np.stack([one(image) for image in images])


def _crop(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], size))
    if top < 0 or left < 0:
        raise ValueError(f"images of {list(images.shape[1:3])} cannot be cropped to {list(size)}")
    return images[:, top : top + size[0], left : left + size[1]]
