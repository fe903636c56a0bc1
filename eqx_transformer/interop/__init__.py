"""Models and the outside world: checkpoints, and published weights."""

from ._checkpoint import load as load
from ._checkpoint import save as save
from ._export import save_pretrained as save_pretrained
from ._hub import load_tokenizer as load_tokenizer
from ._pretrained import load_pretrained as load_pretrained
from ._pytree import load_pytree as load_pytree
from ._pytree import save_pytree as save_pytree
