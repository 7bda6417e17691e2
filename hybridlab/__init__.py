"""hybridlab: does predicting weights instead of running the backward pass pay, on your model and your GPU?"""

from typing import TYPE_CHECKING

from hybridlab.base.lazy import lazy_exports

if TYPE_CHECKING:
    from hybridlab.depth.schedule import DepthSchedule
    from hybridlab.engine.config import HybridTrainerConfig
    from hybridlab.engine.phases import Phase
    from hybridlab.engine.result import StepResult
    from hybridlab.engine.trainer import HybridTrainer

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
