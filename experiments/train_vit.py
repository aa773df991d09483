"""Train a small ViT on MNIST's digits, and measure what quantization leaves of its accuracy.

    python experiments/train_vit.py mnist_t10k.npz --out vit-mnist --minutes 8
    python experiments/train_vit.py mnist_t10k.npz --out vit-mnist --minutes 0

The file holds ``images`` (uint8 ``[n, 28, 28]``) and ``labels``. Its last fifth is the test set, written to
OUT-test.npz; the rest, to OUT-train.npz, is what is trained on, moved by up to two pixels, and calibrated on. One CPU
core is enough. OUT is a checkpoint that transformers' ``ViTForImageClassification`` reads; with ``--minutes 0`` the one
that is there is measured. The table: W8A8, W6A6, W4A4 per tensor; the patches' layer and the head stay float.
"""

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxq
from jaxq.evaluate import classify_images, preprocess, read_images
from jaxq.models import Model, init, load, model_of, save_hf
from jaxq.steps import Step

BATCH, PEAK_RATE, WARMUP_STEPS, SHIFT, CALIBRATED = 64, 1.5e-3, 100, 2, 128
CONFIG = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 64,
    "id2label": {str(digit): str(digit) for digit in range(10)},
    "image_size": 28,
    "intermediate_size": 256,
    "label2id": {str(digit): digit for digit in range(10)},
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": 7,
    "qkv_bias": True,
}
PREPROCESSOR_CONFIG = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.13] * 3,
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.31] * 3,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 28, "width": 28},
}


def split(file: Path, out: Path) -> tuple[Path, Path]:
    """The training and the test set as files of their own, beside ``out``."""
    images, labels = read_images(file)
    last = len(images) // 5
    names = tuple(out.with_name(f"{out.name}-{part}.npz") for part in ("train", "test"))
    for name, part in zip(names, (slice(None, -last), slice(-last, None))):
        name.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(name, images=images[part], labels=labels[part])
    return names


def batches(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Iterator[tuple]:
    """Random images, each moved by a few pixels at random."""
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    height, width = images.shape[1:]
    while True:
        rows = rng.integers(0, len(images), BATCH)
        moves = rng.integers(0, 2 * SHIFT + 1, (BATCH, 2))
        yield np.stack([padded[r, y : y + height, x : x + width] for r, (y, x) in zip(rows, moves)]), labels[rows]


def learning_rate(step: int, done: float) -> float:
    """Warm-up by steps, then a cosine in the share of the time that is done."""
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(images: np.ndarray, labels: np.ndarray, minutes: float, seed: int) -> tuple[Model, Any]:
    params, rng = jax.tree.map(jnp.asarray, init(CONFIG, seed)), np.random.default_rng(seed)
    model = model_of(CONFIG, params, name="vit-mnist", preprocessor=PREPROCESSOR_CONFIG)
    optimizer = optax.inject_hyperparams(lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.05))(0.0)

    def loss(params: Any, pixels: jax.Array, wanted: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.forward(params, pixels), wanted).mean()

    @jax.jit
    def update(params: Any, state: Any, pixels: jax.Array, wanted: jax.Array, rate: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, pixels, wanted)
        state.hyperparams["learning_rate"] = rate
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, begun = optimizer.init(params), time.perf_counter()
    for step, (drawn, wanted) in enumerate(batches(images, labels, rng)):
        done = (time.perf_counter() - begun) / (60 * minutes)
        if done >= 1:
            return model, params
        pixels = preprocess(drawn, model)
        params, state, value = update(params, state, pixels, wanted, jnp.float32(learning_rate(step, done)))
        if step % 500 == 0:
            print(f"step {step}: {done:4.0%}, loss {float(value):.4f}", flush=True)
    raise AssertionError("batches do not end")


def recipes() -> Iterator[tuple[str, Step]]:
    float_head = partial(jaxq.skip, ["patches*", "classifier*"])
    for bits in (8, 6, 4):
        numbers = jaxq.Int(bits, symmetric=False)
        end = jaxq.quantize(jaxq.per_channel(numbers), jaxq.per_tensor(numbers))
        yield f"W{bits}A{bits} round to nearest", float_head(end)
        yield f"W{bits}A{bits} OS+", float_head(jaxq.chain(jaxq.os_plus(), end))
    yield "W4A4 floats, LLM-FP4", float_head(jaxq.llm_fp4(weights=4, activations=4))


def measure(model: Model, train_set: Path, test_set: Path) -> None:
    (images, labels), (calibrated, _) = read_images(test_set), read_images(train_set)
    full = classify_images(model.forward, model.params, model, images, labels, 50)
    print(f"full precision              {full.accuracy:.4f} of {full.examples}", flush=True)
    pixels = preprocess(calibrated[np.linspace(0, len(calibrated) - 1, CALIBRATED).astype(int)], model)
    for name, recipe in recipes():
        quantized = jaxq.calibrate(model.forward, model.params, [(batch,) for batch in np.split(pixels, 4)], recipe)
        found = classify_images(jaxq.execute(model.forward), quantized, model, images, labels, 50)
        print(f"{name:27} {found.accuracy:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train_set, test_set = split(given.images, given.out)
    if given.minutes:
        model, params = train(*read_images(train_set), given.minutes, given.seed)
        shutil.rmtree(given.out, ignore_errors=True)
        save_hf(model, jax.tree.map(np.asarray, params), given.out)
    measure(load(given.out), train_set, test_set)


if __name__ == "__main__":
    main()
