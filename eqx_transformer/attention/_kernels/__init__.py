"""Attention kernels for GPUs and TPUs, in Pallas."""

from ._passes import pallas as pallas
from ._passes import refusal as refusal
