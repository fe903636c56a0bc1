"""What the families of encoders and encoder-decoders have in common."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from ...models import EncoderDecoder, TokenClassifier, TransformerConfig, TransformerEncoder
from .._family import Family, Table, as_it_is
from .._fields import Fields
from .._names import Into
from ._decoder import shortest_pattern

# Fields for how something is computed or trained, not for what is computed. Padding is given by
# masks there.
_NOT_COMPUTED: Final = (
    *("dropout_rate", "drop_path_rate", "attention_implementation", "attention_block_size"),
    *("remat", "unroll", "linear_chunk_size", "cache_max_len", "pad_token_id"),
)
_OF_RELATIVE: Final = ("relative_buckets", "relative_max_distance")
_OF_DECODER: Final = {
    "num_decoder_layers": "num_layers",
    "num_decoder_heads": "num_heads",
    "decoder_d_ff": "d_ff",
}
# Dropout in every encoder.
DROPOUT: Final = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def encoder_family(
    *,
    model_type: str,
    prefix: str,
    name: str,
    read: Callable[[Fields], TransformerConfig],
    write: Callable[[TransformerConfig], dict[str, Any]],
    names: Mapping[str, str | Into],
    parts: str,
    masked_lm: Mapping[str, str],
    masked_lm_bias: str | None = None,
    renamed: tuple[tuple[str, str], ...] = (),
    ignored: tuple[str, ...] = (),
    heads: tuple[Family, ...] = (),
) -> Family:
    """A family whose model is `TransformerEncoder`, alone or with a head for masked tokens.

    Arguments:

    - `prefix`: of the encoder's names, in files that also have a head.
    - `name`: the beginning of the names of the classes of transformers.
    - `read`, `write`, `names`: of the encoder alone; see `Family`. The names are without the
        prefix.
    - `parts`: a regular expression for what they begin with.
    - `masked_lm`: the names of the head.
    - `masked_lm_bias`: the name of a copy of the bias on its logits.
    - `renamed`, `ignored`, `heads`: see `Family`.
    """
    with_prefix = encoder_names(names, prefix)
    pooler = rf"{re.escape(prefix)}pooler\..*"
    embedding = next(
        there for there, here in with_prefix.items() if here == "encoder.embedding.embedding"
    )
    bias = next(there for there, here in masked_lm.items() if here == "logit_bias")
    head = next(there for there, here in masked_lm.items() if here == "head")
    tied = {f"{head}.weight": f"{embedding}.weight"}
    head_names = dict(masked_lm)
    untied = dict(masked_lm)
    if masked_lm_bias is not None:
        tied[masked_lm_bias] = bias
        # If the two differ, transformers uses that of the linear map.
        untied[masked_lm_bias] = untied.pop(bias)
    masked = Family(
        model_type=model_type,
        architecture=f"{name}ForMaskedLM",
        model=functools.partial(TokenClassifier, transform="linear_norm"),
        read=lambda fields: _read_masked_lm(read, fields),
        write=lambda config: write(config) | {"tie_word_embeddings": config.tie_embeddings},
        differences=differences,
        names=lambda config: with_prefix | (head_names if config.tie_embeddings else untied),
        renamed=((rf"^({parts})\.", rf"{prefix}\1."), *renamed),
        ignored=(*ignored, pooler, re.escape(bias)),
        tied=tied,
    )
    return Family(
        model_type=model_type,
        architecture=f"{name}Model",
        model=TransformerEncoder,
        read=read,
        write=write,
        differences=differences,
        names=lambda config: names,
        renamed=((rf"^{re.escape(prefix)}", ""), *renamed),
        ignored=(*ignored, *(rf"{re.escape(there)}(\..*)?" for there in masked_lm)),
        # Some files have none; transformers would initialise one at random.
        adapt=lambda config, names: config.replace(pooler="pooler.dense.weight" in names),
        heads=(masked, *heads),
    )


def encoder_names(names: Mapping[str, str | Into], prefix: str) -> dict[str, str | Into]:
    """The names of an encoder in files, and in models, that also have a head."""
    result: dict[str, str | Into] = {}
    for there, here in names.items():
        paths = [f"encoder.{path}" for path in (here.paths if isinstance(here, Into) else [here])]
        # Rows with several parts have no other options here.
        result[prefix + there] = Into(*paths) if isinstance(here, Into) else paths[0]
    return result


def _read_masked_lm(
    read: Callable[[Fields], TransformerConfig], fields: Fields
) -> TransformerConfig:
    tied = fields.take("tie_word_embeddings", True)
    return read(fields).replace(head_bias=True, tie_embeddings=tied, pooler=False)


def seq2seq_family(
    *,
    model_type: str,
    architecture: str,
    read: Callable[[Fields], TransformerConfig],
    write: Callable[[TransformerConfig], dict[str, Any]],
    names: Callable[[TransformerConfig], Table],
    renamed: tuple[tuple[str, str], ...] = (),
    ignored: tuple[str, ...] = (),
    tied: Mapping[str, str],
    adapt: Callable[[TransformerConfig, Collection[str]], TransformerConfig] = as_it_is,
) -> Family:
    """A family whose model is `EncoderDecoder`; see `Family`."""
    return Family(
        model_type=model_type,
        architecture=architecture,
        model=EncoderDecoder,
        read=read,
        write=lambda config: write(completed(config)),
        differences=differences,
        names=names,
        renamed=renamed,
        ignored=ignored,
        tied=tied,
        adapt=adapt,
    )


def completed(config: TransformerConfig) -> TransformerConfig:
    """The configuration with the decoder's sizes filled in where they default to the encoder's."""
    return config.replace(
        **{
            name: getattr(config, same) if getattr(config, name) is None else getattr(config, name)
            for name, same in _OF_DECODER.items()
        }
    )


def canonical(config: TransformerConfig) -> TransformerConfig:
    """The same for all configurations whose models compute the same.

    Options of training and of the implementation do not count.
    """
    config = completed(config)
    kinds = config.block_kinds(config.num_layers)
    types = shortest_pattern(["sliding" if kind.sliding else "global" for kind in kinds])
    changes: dict[str, Any] = {
        "d_embedding": config.embedding_dim,
        "k_bias": config.use_bias if config.k_bias is None else config.k_bias,
        "layer_types": types,
        "window": config.window if "sliding" in types else None,
    }
    if config.num_heads == config.num_decoder_heads:
        head_dim = config.head_dim or config.d_model // config.num_heads
        changes["head_dim"] = head_dim
        changes["num_kv_heads"] = config.num_kv_heads or config.num_heads
        changes["query_scale"] = config.query_scale or head_dim**-0.5
    unused = [*_NOT_COMPUTED]
    if config.positions != "relative":
        unused += _OF_RELATIVE
    if config.positions != "rope":
        unused += ["rope_theta"]
    elif config.rope_local_theta is None and "sliding" in types:
        changes["rope_local_theta"] = config.rope_theta
    changes |= {name: getattr(TransformerConfig, name) for name in unused}
    return config.replace(**changes)


def differences(a: TransformerConfig, b: TransformerConfig) -> list[str]:
    """The fields that make the models of two configurations compute different things."""
    a, b = canonical(a), canonical(b)
    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    return [name for name in names if getattr(a, name) != getattr(b, name)]
