"""The likeliest mistakes, each made once, as a user would: without types checked at run time.

Prints what a person would see, as JSON: `{"name": ["ValueError", "message"]}`. See
`test_error_messages.py`, which runs it and knows the messages by heart.
"""

import json
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import AxisType

from eqx_transformer.attention import Causal, Dense, Padding, Segments, dot_product_attention
from eqx_transformer.generation import PagedCache, beam_search, generate
from eqx_transformer.inspection import capture
from eqx_transformer.interop import load, load_pretrained, save
from eqx_transformer.models import (
    CLIP,
    UPT,
    AnchorTransformer,
    AnchorTransformerConfig,
    CLIPConfig,
    DeBERTa,
    DeBERTaConfig,
    DiT,
    DiTConfig,
    EncoderDecoder,
    Llama,
    LlamaConfig,
    SequenceClassifier,
    TextTower,
    TokenClassifier,
    TokenEmbedding,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    Transolver,
    TransolverConfig,
    UPTConfig,
    VisionTransformer,
    ViTConfig,
    Whisper,
    WhisperConfig,
    pool,
)
from eqx_transformer.nn import Attention
from eqx_transformer.sharding import ParallelConfig, shard
from eqx_transformer.training import (
    accumulated_value_and_grad,
    add_lora,
    cross_entropy_from_hidden,
    merge_lora,
)

folder = Path(tempfile.mkdtemp())
(folder / "mamba").mkdir()
(folder / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
(folder / "llama").mkdir()
(folder / "llama" / "config.json").write_text('{"model_type": "llama"}')

sizes = {"vocab_size": 20, "d_model": 16, "num_heads": 4, "num_layers": 2, "max_len": 16}
config = LlamaConfig(**sizes)
classic = TransformerConfig(**sizes)
key = jr.key(0)
model = Llama(config, key=key)
encoder = TransformerEncoder(classic, key=key)
attention = Attention(16, 4, key=key)
small_image = {"image_size": 8, "patch_size": 4, "d_model": 16, "num_heads": 4, "num_layers": 1}
vit = VisionTransformer(ViTConfig(**small_image), key=key)
tokens = jnp.arange(6)
batch = jnp.zeros((2, 6), jnp.int32)
x = jnp.ones((6, 16))
q = jnp.ones((6, 4, 8))
pages = PagedCache.init(model, num_sequences=2, num_pages=4, page_size=4)
two_classes = eqx.Partial(SequenceClassifier, num_classes=2)
save(model, folder / "own")

bert = classic.replace(layout="post", embedding_norm=True, final_norm=False)
clip = CLIPConfig(vision=ViTConfig(), text=classic, text_pooling="last")
CONFIGS = {
    AnchorTransformer: AnchorTransformerConfig(
        num_dims=2, branches=("a", "b"), out_features=(1, 1)
    ),
    CLIP: clip,
    DeBERTa: DeBERTaConfig(transformer=bert),
    DiT: DiTConfig(),
    EncoderDecoder: classic,
    Llama: config,
    SequenceClassifier: classic,
    TextTower: clip,
    TokenClassifier: classic,
    TokenEmbedding: classic,
    TransformerDecoder: classic,
    TransformerEncoder: classic,
    Transolver: TransolverConfig(num_features=3, out_features=1),
    UPT: UPTConfig(num_dims=2, out_features=1),
    VisionTransformer: ViTConfig(),
    Whisper: WhisperConfig(transformer=classic),
}
"""What every model is built from."""


def overflow():
    def twice(cache):
        _, cache = model.extend(tokens, cache)
        return model.extend(tokens, cache)

    return jax.block_until_ready(eqx.filter_jit(twice)(model.init_cache(8)))


def mesh(*names):
    return jax.make_mesh((1,) * len(names), names, axis_types=(AxisType.Auto,) * len(names))


MISTAKES = {
    # Batches and shapes
    "model without vmap": lambda: model(batch),
    "layer without vmap": lambda: attention(x[None]),
    "attention without vmap": lambda: dot_product_attention(q[None], q[None], q[None]),
    "one token": lambda: model(tokens[0]),
    "vmap over a single text": lambda: jax.vmap(model)(tokens),
    "tokens as a list": lambda: model([1, 2, 3]),
    "tokens as floats": lambda: model(tokens.astype(jnp.float32)),
    "text too long": lambda: model(jnp.zeros(20, jnp.int32)),
    "batch in positions": lambda: model(tokens, positions=batch),
    "too few positions": lambda: model(tokens, positions=tokens[:4]),
    "wrong d_model": lambda: attention(jnp.ones((6, 12))),
    "keys and values differ": lambda: dot_product_attention(q, q, q[:5]),
    "head sizes differ": lambda: dot_product_attention(q, q[..., :4], q),
    "heads that do not divide": lambda: dot_product_attention(q, q[:, :3], q[:, :3]),
    "dtypes mixed": lambda: dot_product_attention(q.astype(jnp.bfloat16), q, q),
    "image with channels last": lambda: vit(jnp.ones((8, 8, 3))),
    "image of another size": lambda: vit(jnp.ones((3, 9, 8))),
    "no target": lambda: EncoderDecoder(classic, key=key)(tokens),
    # Keys
    "no key for dropout": lambda: encoder(tokens),
    "a number as key": lambda: encoder(tokens, key=0),
    "no key for weights": lambda: Llama(config, key=None),
    # Masks
    "array as mask": lambda: model(tokens, mask=jnp.ones((6, 6), bool)),
    "array as mask of attention": lambda: dot_product_attention(q, q, q, mask=jnp.ones((6, 6))),
    "matrix of the wrong size": lambda: dot_product_attention(
        q, q, q, mask=Dense(jnp.ones((5, 6), bool))
    ),
    "padding too short": lambda: model(tokens, mask=Padding(jnp.ones(5, bool))),
    "padding of a batch": lambda: model(tokens, mask=Padding(jnp.ones((2, 6), bool))),
    "padding as numbers": lambda: Padding(jnp.ones(6, jnp.int32)),
    "documents too short": lambda: model(tokens, mask=Segments(jnp.zeros(4, jnp.int32))),
    "masks joined by and": lambda: Causal() and Padding(jnp.ones(6, bool)),
    # Caches and generation
    "cache too small": lambda: model.extend(tokens, model.init_cache(4)),
    "cache that gets full": overflow,
    "cache larger than max_len": lambda: model.init_cache(32),
    "cache of a deeper model": lambda: model.extend(
        tokens, Llama(config.replace(num_layers=3), key=key).init_cache(16)
    ),
    "cache of a model with other heads": lambda: model.extend(
        tokens, Llama(config.replace(num_kv_heads=2), key=key).init_cache(16)
    ),
    "cache of another class": lambda: model.extend(
        tokens, TransformerDecoder(classic, key=key).init_cache(16)
    ),
    "caches of a batch": lambda: model.extend(
        tokens, jax.vmap(lambda _: model.init_cache(16))(jnp.arange(2))
    ),
    "negative temperature": lambda: generate(
        model, tokens, max_new_tokens=2, temperature=-1.0, key=key
    ),
    "top_p above one": lambda: generate(model, tokens, max_new_tokens=2, top_p=1.5, key=key),
    "sampling without a key": lambda: generate(model, tokens, max_new_tokens=2),
    "prompt too long": lambda: generate(model, tokens, max_new_tokens=20, temperature=0.0),
    "empty prompt": lambda: generate(model, tokens[:0], max_new_tokens=2, temperature=0.0),
    "batch of prompts": lambda: generate(model, batch, max_new_tokens=2, temperature=0.0),
    "generating with an encoder": lambda: generate(
        encoder, tokens, max_new_tokens=2, temperature=0.0
    ),
    "pages for one row": lambda: pages.extend(model, tokens),
    "one length for all rows": lambda: pages.extend(model, batch, jnp.asarray(3)),
    "a number as rows": lambda: pages.extend(model, batch[:1], rows=0),
    "no beams": lambda: beam_search(model, tokens, max_new_tokens=2, num_beams=0),
    # Configurations
    "misspelt field": lambda: LlamaConfig(vocab_size=20, d_modle=16),
    "misspelt field in replace": lambda: config.replace(num_layer=3),
    "misspelt mesh axis": lambda: ParallelConfig(tensr=2),
    "text for a number": lambda: LlamaConfig(vocab_size="20"),
    "d_model and num_heads": lambda: config.replace(d_model=18),
    "num_heads and num_kv_heads": lambda: config.replace(num_kv_heads=3),
    "percent for a rate": lambda: classic.replace(dropout_rate=10),
    "field without effect": lambda: config.replace(rope_local_theta=1e4),
    "class as config": lambda: Llama(LlamaConfig, key=key),
    "config and key swapped": lambda: Llama(key, key=config),
    "unknown implementation": lambda: dot_product_attention(q, q, q, implementation="flash"),
    "unknown pooling": lambda: two_classes(classic, pooling="last", key=key),
    "unknown pooling of vectors": lambda: pool(x, how="last"),
    "unknown transform": lambda: two_classes(classic, transform="norm", key=key),
    # Stacks
    "layer that there is not": lambda: model.stack[7],
    "calling a layer of a stack": lambda: model.stack.blocks(x),
    "calling a projection of a stack": lambda: model.stack.blocks.attention(x),
    # Files
    "no checkpoint": lambda: load(folder / "nothing"),
    "published weights by load": lambda: load(folder / "llama"),
    "own checkpoint by load_pretrained": lambda: load_pretrained(folder / "own"),
    "no folder": lambda: load_pretrained(folder / "nothing"),
    "unknown family": lambda: load_pretrained(folder / "mamba"),
    # Training, sharding, inspection
    "adapters that match nothing": lambda: add_lora(
        model, 4, alpha=8, where=lambda path: "qkv" in path, key=key
    ),
    "rank too large": lambda: add_lora(model, 64, alpha=8, key=key),
    "merging without adapters": lambda: merge_lora(model),
    "targets not shifted": lambda: cross_entropy_from_hidden(
        model.logits, model.hidden(tokens), tokens[1:]
    ),
    "parts that do not divide": lambda: accumulated_value_and_grad(
        lambda model, batch: (model(batch[0]).sum(), jnp.asarray(1.0)), 4
    )(model, jnp.zeros((6, 6), jnp.int32)),
    "unknown mesh axis": lambda: shard(model, mesh("model")),
    "unknown value to capture": lambda: capture(model, "logits"),
}


def build(model, config, key):
    return (two_classes if model is SequenceClassifier else model)(config, key=key)


for model_class, own in CONFIGS.items():
    other = classic if model_class is Llama else config
    name = model_class.__name__
    MISTAKES[f"{name} of another config"] = eqx.Partial(build, model_class, other, key)
    MISTAKES[f"{name} of a number as key"] = eqx.Partial(build, model_class, own, 0)


def made() -> dict[str, tuple[str, str]]:
    seen = {}
    for name, mistake in MISTAKES.items():
        try:
            mistake()
        except Exception as error:
            seen[name] = (type(error).__name__, str(error).replace(str(folder), "FOLDER"))
        else:
            seen[name] = ("nothing", "")
    return seen


if __name__ == "__main__":
    json.dump(made(), sys.stdout)
