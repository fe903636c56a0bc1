"""Models and the outside world: checkpoints."""

from ._checkpoint import load as load
from ._checkpoint import save as save
from ._optax import weight_decay_mask as weight_decay_mask
from ._pytree import load_pytree as load_pytree
from ._pytree import save_pytree as save_pytree
