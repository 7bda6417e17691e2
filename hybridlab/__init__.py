"""hybridlab: does predicting weights instead of running the backward pass pay, on your model and your card?"""

from hybridlab.config import HybridTrainerConfig
from hybridlab.phases import Phase
from hybridlab.step_result import StepResult
from hybridlab.trainer import HybridTrainer

__all__ = ["HybridTrainer", "HybridTrainerConfig", "Phase", "StepResult"]
__version__ = "0.1.0"
