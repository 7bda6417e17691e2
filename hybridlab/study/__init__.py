"""Studies: arms and seeds become runs, and runs become comparisons."""

from typing import TYPE_CHECKING

from hybridlab.base.lazy import lazy_exports

if TYPE_CHECKING:
    from hybridlab.study.comparison import Comparison, compare
    from hybridlab.study.config import RunConfig
    from hybridlab.study.ladder import Ladder
    from hybridlab.study.own_task import OwnTaskConfig, find_task
    from hybridlab.study.rates import bracket_rates, bracket_study
    from hybridlab.study.run import train
    from hybridlab.study.study import Study, StudyResult, shallow_control_name
    from hybridlab.study.tasks import HuggingFaceTaskConfig, ImageTaskConfig, TextTaskConfig

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
