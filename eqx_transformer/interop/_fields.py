"""The fields of a published `config.json`, each of which is understood or refused."""

from collections.abc import Mapping
from typing import Any, Final

_REQUIRED: Final = object()
_MAX_COUNT: Final = 10_000

# Fields that every configuration may have and that change nothing here: its origin, training,
# generation of text, the meaning of tokens.
_HARMLESS: Final = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation attn_implementation architectures auto_map
    model_type transformers_version torch_dtype dtype use_cache cache_implementation torchscript
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    initializer_range initializer_factor attention_dropout hidden_dropout classifier_dropout
    output_attentions output_hidden_states return_dict use_return_dict gradient_checkpointing
    id2label label2id problem_type task_specific_params finetuning_task prefix pretraining_tp
    chunk_size_feed_forward output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens output_scores return_dict_in_generate
    """.split()
)


class Fields:
    """Fields of a configuration, crossed off as they are read.

    Arguments:

    - `values`: the fields by name.
    - `name`: what to call them in errors.
    """

    def __init__(self, values: Mapping[str, Any], name: str):
        self._left = dict(values)
        self._name = name

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field; `default` if it is not there.

        Raises:

        - `ValueError` if it is not there and has no default.
        """
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self._name} has no field {name!r}.")
        return value

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """A number of layers or experts, bounded because there will be a loop over them.

        Raises:

        - `ValueError` if it is not a number that a model may have.
        """
        value = self.take(name, default)
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            raise ValueError(f"{self._name}: {name}={value!r} must be from 0 to {_MAX_COUNT}.")
        return value

    def has(self, name: str) -> bool:
        """Whether there is a field of this name that was not read."""
        return name in self._left

    def default(self, name: str, value: Any) -> None:
        """Sets the value of a field if it is missing."""
        self._left.setdefault(name, value)

    def rename(self, old: str, name: str) -> None:
        """Lets the field `old` be read as `name`, if there is no field of that name."""
        if old in self._left:
            self._left.setdefault(name, self._left.pop(old))

    def nested(self, name: str) -> "Fields | None":
        """The fields of a nested object; `None` if it is missing or null.

        Raises:

        - `ValueError` if it is not an object.
        """
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{self._name}: {name}={value!r} must be an object.")
        return Fields(value, f"{self._name}: {name}")

    def choose(self, name: str, options: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
        """The option that the value of a field stands for.

        Raises:

        - `ValueError` if it is not one of the options.
        """
        value = self.take(name, default)
        if isinstance(value, list | dict) or value not in options:
            raise ValueError(
                f"{self._name}: {name}={value!r} is not supported; only {sorted(options, key=str)}."
            )
        return options[value]

    def ignore(self, *names: str) -> None:
        """Crosses off fields that change nothing."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raises an error for fields that are left.

        Raises:

        - `ValueError` naming each field that was not read, unless it has no content (null, false,
            empty) or is one of those that change nothing in any model.
        """
        left = {
            name: value
            for name, value in self._left.items()
            if name not in _HARMLESS and not (value is None or value is False or value in ([], {}))
        }
        if left:
            said = ", ".join(f"{name}={value!r:.80}" for name, value in sorted(left.items()))
            raise ValueError(
                f"{self._name} has fields whose effect on the model is not known here: {said}. "
                "If they have none, set them to null in a copy of the file."
            )
