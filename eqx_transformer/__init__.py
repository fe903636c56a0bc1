"""Transformers for functional JAX: Equinox modules through which every derivative works.

Folders are layers, each built from those before it:

- `attention`: the attention functions, with their masks and score mods. Arrays in, arrays out.
- `nn`: layers, which hold parameters and take one example, `[seq, d_model]`.
- `stacks`: blocks of layers, and depth as an axis of the parameters.
- `models`: a config in, a model out.
- `generation`: sampling from a model with its cache.
- `training`: labels for optimisers, adapters, losses and gradients that fit into memory.
- `inspection`: intermediate values of layers, to look at and to replace.
- `sharding`: models on many devices.
- `interop`: checkpoints and the outside world.
"""

from . import attention as attention
from . import generation as generation
from . import inspection as inspection
from . import interop as interop
from . import models as models
from . import nn as nn
from . import sharding as sharding
from . import stacks as stacks
from . import training as training
from ._scan import filter_scan as filter_scan

__version__ = "0.1.0"
