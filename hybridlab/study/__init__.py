"""Studies: arms and seeds become runs, and runs become comparisons."""

from typing import TYPE_CHECKING

from hybridlab.base.lazy import lazy_exports

if TYPE_CHECKING:
    from hybridlab.study.comparison import Comparison, compare
    from hybridlab.study.config import RunConfig
    from hybridlab.study.huggingface_task import HuggingFaceTaskConfig
    from hybridlab.study.ladder import Ladder
    from hybridlab.study.own_task import OwnTaskConfig, find_task
    from hybridlab.study.rates import bracket_rates, bracket_study
    from hybridlab.study.run import train
    from hybridlab.study.study import Study, StudyResult
    from hybridlab.study.tasks import ImageTaskConfig, TextTaskConfig

__all__ = [
    "Comparison",
    "HuggingFaceTaskConfig",
    "ImageTaskConfig",
    "Ladder",
    "OwnTaskConfig",
    "RunConfig",
    "Study",
    "StudyResult",
    "TextTaskConfig",
    "bracket_rates",
    "bracket_study",
    "compare",
    "find_task",
    "train",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
