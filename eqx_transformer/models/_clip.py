import dataclasses
import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractLinear, Linear
from ._checks import check_arguments, check_sizes, check_token_ids
from ._config import AbstractConfig
from ._encoder import encode
from ._token_embedding import TokenEmbedding
from ._transformer_config import TransformerConfig
from ._transformer_parts import AnyStack, make_norm, make_stack
from ._vit import VisionTransformer
from ._vit_config import ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(AbstractConfig):
    """The numbers that make a `CLIP`.

    Arguments:

    - `vision`: of the image tower, which must have no head.
    - `text`: of the text tower.
    - `d_embedding`: size of the space in which images and texts are compared.
    - `text_causal`: whether a token sees only earlier ones.
    - `text_pooling`: which position represents a text: the first `eos_token_id` (`"eos"`), the
        token with the largest id (`"largest"`, which is the same in the vocabulary of the published
        CLIPs), or the last position (`"last"`).
    - `eos_token_id`: the token that ends texts, for `text_pooling="eos"`.
    - `image_projection`: whether the image's vector is projected; if not, it must be of size
        `d_embedding`.
    - `text_projection_bias`: whether the projection of the text's vector has a bias.
    - `loss`: `"softmax"`, where every image chooses among the texts of a batch and every text among
        the images (CLIP), or `"sigmoid"`, where every pair is judged on its own (SigLIP), for which
        scores have a learned bias.
    """

    vision: ViTConfig
    text: TransformerConfig
    d_embedding: int = 512
    text_causal: bool = True
    text_pooling: Literal["eos", "largest", "last"] = "eos"
    eos_token_id: int | None = None
    image_projection: bool = True
    text_projection_bias: bool = False
    loss: Literal["softmax", "sigmoid"] = "softmax"

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(self, "d_embedding")
        if self.vision.num_classes is not None:
            raise ValueError(
                f"CLIPConfig: vision.num_classes={self.vision.num_classes} must be None: the "
                "vector of an image is compared, not classified."
            )
        if not self.image_projection and self.vision.d_model != self.d_embedding:
            raise ValueError(
                f"CLIPConfig: vision.d_model={self.vision.d_model} must be d_embedding="
                f"{self.d_embedding} where there is no image_projection."
            )
        check_token_ids(self, self.text.vocab_size, "eos_token_id")
        if self.text.pooler:
            raise ValueError(
                "CLIPConfig: pooler=True of the text has no effect, because text_pooling="
                f"{self.text_pooling!r} says what stands for a text; leave it out."
            )
        if (self.text_pooling == "eos") != (self.eos_token_id is not None):
            raise ValueError(
                f"CLIPConfig: text_pooling={self.text_pooling!r} and eos_token_id="
                f"{self.eos_token_id} do not fit: 'eos' needs an id, the others have no use for it."
            )


class TextTower(eqx.Module):
    """A transformer that reads a text and returns one vector for it."""

    config: CLIPConfig = eqx.field(static=True)
    embedding: TokenEmbedding
    stack: AnyStack
    norm: Any

    def __init__(self, config: CLIPConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("TextTower", config, CLIPConfig, key)
        embedding_key, stack_key = jax.random.split(key)
        text = config.text
        self.config = config
        self.embedding = TokenEmbedding(text, key=embedding_key)
        self.stack = make_stack(text, text.num_layers, causal=config.text_causal, key=stack_key)
        self.norm = make_norm(text, text.d_model) if text.final_norm else None

    @unbatched(tokens="seq")
    def encode(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """One vector for every position.

        Arguments:

        - `tokens`: their ids.
        - `mask`: who may attend to whom, combined by `&` with the mask of the configuration.
        - `key`: for dropout.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        parts = (self.embedding, self.stack, self.norm)
        return encode(*parts, tokens, mask=mask, key=key)[0]

    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " d_model"]:
        """The vector of the text. Arguments are those of `encode`."""
        x = self.encode(tokens, mask=mask, key=key)
        if self.config.text_pooling == "last":
            return x[-1]
        if self.config.text_pooling == "largest":
            return x[jnp.argmax(tokens)]
        return x[jnp.argmax(tokens == self.config.eos_token_id)]


class CLIP(eqx.Module):
    """Embeds images and texts in one space, where those that belong together are close.

    CLIP (Radford et al., 2021), and with other settings SigLIP (Zhai et al., 2023).

        image_embedding = normalised(image_proj(image_tower(image)))
        text_embedding = normalised(text_proj(text_tower(tokens)))
        score = exp(logit_scale) * image_embedding . text_embedding + logit_bias
    """

    config: CLIPConfig = eqx.field(static=True)
    image_tower: VisionTransformer
    text_tower: TextTower
    image_proj: AbstractLinear | None
    text_proj: AbstractLinear
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""] | None

    def __init__(self, config: CLIPConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("CLIP", config, CLIPConfig, key)
        image_key, text_key, image_proj_key, text_proj_key = jax.random.split(key, 4)
        self.config = config
        self.image_tower = VisionTransformer(config.vision, key=image_key)
        self.text_tower = TextTower(config, key=text_key)
        self.image_proj = None
        if config.image_projection:
            self.image_proj = Linear(config.vision.d_model, config.d_embedding, key=image_proj_key)
        self.text_proj = Linear(
            config.text.d_model,
            config.d_embedding,
            use_bias=config.text_projection_bias,
            key=text_proj_key,
        )
        # As in the papers: a temperature of 0.07, or of 0.1 with a bias, because far more pairs do
        # not belong together than do.
        sigmoid = config.loss == "sigmoid"
        self.logit_scale = jnp.asarray(math.log(10.0 if sigmoid else 1 / 0.07))
        self.logit_bias = jnp.asarray(-10.0) if sigmoid else None

    @jax.named_scope("eqx_transformer.models.CLIP.embed_image")
    @unbatched(image="channels height width")
    def embed_image(
        self, image: Float[Array, "channels height width"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " d_embedding"]:
        """The embedding of an image, of length one; `key` is for dropout."""
        x = self.image_tower(image, key=key)
        return _normalised(x if self.image_proj is None else self.image_proj(x))

    @jax.named_scope("eqx_transformer.models.CLIP.embed_text")
    @unbatched(tokens="seq")
    def embed_text(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " d_embedding"]:
        """The embedding of a text, of length one. Arguments are those of `TextTower.encode`."""
        return _normalised(self.text_proj(self.text_tower(tokens, mask=mask, key=key)))

    def scores(
        self, images: Float[Array, "images d_embedding"], texts: Float[Array, "texts d_embedding"]
    ) -> Float[Array, "images texts"]:
        """How well images and texts match, given their embeddings.

        The softmax of a row gives the probabilities of the texts for an image; with
        `loss="sigmoid"` the sigmoid of an element is the probability that the pair matches.
        """
        scores = jnp.exp(self.logit_scale).astype(images.dtype) * (images @ texts.T)
        return scores if self.logit_bias is None else scores + self.logit_bias.astype(scores.dtype)

    def loss(
        self, images: Float[Array, "pairs d_embedding"], texts: Float[Array, "pairs d_embedding"]
    ) -> Float[Array, ""]:
        """The contrastive loss of a batch of pairs that belong together, given their embeddings.

        (Radford et al., 2021, figure 3; Zhai et al., 2023, equation 1.)
        """
        scores = self.scores(images, texts)
        scores = scores.astype(accumulation_dtype(scores.dtype))
        if self.config.loss == "sigmoid":
            signs = 2 * jnp.eye(len(scores), dtype=scores.dtype) - 1
            return -jax.nn.log_sigmoid(signs * scores).sum() / len(scores)
        of_images, of_texts = (jax.nn.log_softmax(scores, axis=axis) for axis in (1, 0))
        return -jnp.trace(of_images + of_texts) / (2 * len(scores))


def _normalised(x: Float[Array, " size"]) -> Float[Array, " size"]:
    wide = x.astype(accumulation_dtype(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide))).astype(x.dtype)
