"""What training needs besides a model and an optimiser."""

from ._accumulation import accumulated_value_and_grad as accumulated_value_and_grad
from ._cross_entropy import cross_entropy_from_hidden as cross_entropy_from_hidden
from ._ema import EMA as EMA
from ._flops import model_flops as model_flops
from ._labels import muon_dimension_numbers as muon_dimension_numbers
from ._labels import parameter_labels as parameter_labels
from ._labels import trainable as trainable
from ._labels import weight_decay_mask as weight_decay_mask
from ._lora import LoRALinear as LoRALinear
from ._lora import add_lora as add_lora
from ._lora import lora_filter as lora_filter
from ._lora import merge_lora as merge_lora
from ._mup import mup_init as mup_init
from ._mup import mup_learning_rates as mup_learning_rates
from ._precision_policy import PrecisionPolicy as PrecisionPolicy
from ._summary import ParameterCounts as ParameterCounts
from ._summary import parameter_counts as parameter_counts
from ._summary import summary as summary
