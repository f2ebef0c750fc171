"""What trains and what does not: adapters, frozen parts, and the errors of both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_i06_helpers import training_batch
from tiny import LANGUAGES, close, make_vlm
from torch import Tensor, nn

from eyespot.models.lora import add_lora, linear_layers
from eyespot.models.vlm import VLM
