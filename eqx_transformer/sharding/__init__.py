"""Models on many devices: which parameter is split over which axis of a mesh."""

from ._config import ParallelConfig as ParallelConfig
from ._context import context_parallel as context_parallel
from ._experts import expert_parallel as expert_parallel
from ._gathered import gathered as gathered
from ._pipeline import pipeline_parallel as pipeline_parallel
from ._place import batch_sharding as batch_sharding
from ._place import init_sharded as init_sharded
from ._place import shard as shard
from ._rules import TENSOR as TENSOR
from ._rules import Rule as Rule
from ._rules import Rules as Rules
from ._rules import specs as specs
from ._table import sharding_table as sharding_table
