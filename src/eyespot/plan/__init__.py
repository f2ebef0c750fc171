"""What a run will need, said before it starts: parameters, FLOPs, memory, time and cost.

Nothing is loaded and nothing is estimated by formula where the code itself can be asked: a step of the run is traced
over tensors that hold nothing (``eyespot.plan.trace``), on batches of the run's own data without their pictures
(``eyespot.plan.batches``). This machine is measured by running the operations of that step (``eyespot.plan.machine``);
rented GPUs are estimated from what their makers state (``eyespot.plan.devices``).
"""

from eyespot.plan.batches import Assumed
from eyespot.plan.compare import compare, remember
from eyespot.plan.make import Plan, make_plan
from eyespot.plan.show import show

__all__ = ["Assumed", "Plan", "compare", "make_plan", "remember", "show"]
