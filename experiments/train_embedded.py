"""Train the embedded model: a small OPT on the sources of Python's own standard library.

    python experiments/train_embedded.py --out jaxq/models/embedded/stdlib-opt --minutes 40

One CPU core is enough. The best model so far is always in ``--out``, complete, so the run may be stopped at any time;
with ``--resume`` the model found there is trained on, through another cycle of the learning rate. What ships was
trained that way: 40 minutes, then 60 more.
"""

import argparse
import math
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from jaxq.evaluate import pack, perplexity, stdlib_documents
from jaxq.models import Model, init, load, model_of, save_hf

CONTEXT, BATCH, PEAK_RATE, WARMUP_STEPS, SAVE_SECONDS = 256, 8, 2e-3, 100, 240
CONFIG = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "do_layer_norm_before": True,
    "dropout": 0.0,
    "enable_bias": True,
    "eos_token_id": 1,
    "ffn_dim": 768,
    "hidden_size": 192,
    "init_std": 0.02,
    "layer_norm_elementwise_affine": True,
    "layerdrop": 0.0,
    "max_position_embeddings": CONTEXT,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": None,
    "tie_word_embeddings": True,
    "vocab_size": 1024,
    "word_embed_proj_dim": 192,
}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a begin and an end token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT, add_prefix_space=False
    )


def initial_params(seed: int) -> Any:
    """Normal(0.02) matrices, smaller where they write into the residual stream (by the root of their number)."""
    residual = 0.02 / math.sqrt(2 * CONFIG["num_hidden_layers"])

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim < 2:
            return leaf
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return jax.random.normal(key, leaf.shape) * (residual if "/out/" in name or "/down/" in name else 0.02)

    return jax.tree_util.tree_map_with_path(draw, init(CONFIG, seed))


def make_step(model: Model) -> tuple[optax.GradientTransformation, Callable]:
    """AdamW with gradient clipping; the learning rate comes in as a number, for it follows the clock."""
    optimizer = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(learning_rate, b2=0.98, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        )
    )(learning_rate=0.0)

    def loss(params: Any, window: jax.Array) -> jax.Array:
        logits = model.forward(params, window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any, window: jax.Array, rate: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, window)
        state.hyperparams["learning_rate"] = rate
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


def learning_rate(step: int, done: float) -> float:
    """Warm-up by steps, then a cosine in the share of the time that is done, down to a fiftieth of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def write(model: Model, params: Any, out: Path) -> None:
    """Replace ``out`` by the model in float16; a reader sees the old directory or the new one, complete."""
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_hf(model, jax.tree.map(lambda x: np.asarray(x, np.float16), params), new)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def train(out: Path, minutes: float, seed: int, resume: bool) -> None:
    documents, heldout = stdlib_documents("train"), stdlib_documents("heldout")
    if resume:
        model = load(out)
        tokenizer = model.tokenizer
    else:
        tokenizer = train_tokenizer(documents)
        model = model_of(CONFIG, initial_params(seed), tokenizer, "stdlib-opt")
    stream, windows = pack(documents, tokenizer, 1)[:, 0], pack(heldout, tokenizer, CONTEXT)
    bits = math.log2(math.e) * windows.size / len(tokenizer.decode(windows.reshape(-1)).encode())
    print(f"{len(stream)} tokens to learn from, {windows.size} held out", flush=True)

    params = jax.tree.map(jnp.asarray, model.params)
    optimizer, step = make_step(model)
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    best = perplexity(model.forward, params, windows).perplexity if resume else math.inf
    begun = saved = time.perf_counter()
    bar = tqdm(total=round(minutes * 60), unit="s", mininterval=10)
    for number in range(10**9):
        now = time.perf_counter()
        done = (now - begun) / (60 * minutes)
        if now - saved > SAVE_SECONDS or done >= 1.0:
            found = perplexity(model.forward, params, windows).perplexity
            bar.write(f"step {number}: held-out perplexity {found:.3f}, {math.log(found) * bits:.4f} bits per byte")
            if found < best:
                best = found
                write(model, params, out)
            saved = time.perf_counter()
        if done >= 1.0:
            break
        starts = rng.integers(0, len(stream) - CONTEXT - 1, BATCH)
        window = stream[starts[:, None] + np.arange(CONTEXT + 1)[None]]
        params, state, value = step(params, state, window, jnp.float32(learning_rate(number, done)))
        if number % 20 == 0:
            bar.set_postfix(step=number, loss=f"{float(value):.3f}", refresh=False)
        bar.update(round(time.perf_counter() - begun) - bar.n)
    bar.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0, help="a resumed run takes another one")
    parser.add_argument("--resume", action="store_true", help="train the model in --out on")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.seed, arguments.resume)
