"""Studies: arms and seeds become runs, and runs become comparisons."""

from typing import TYPE_CHECKING

from hybridlab.base.lazy import lazy_exports

if TYPE_CHECKING:
    from hybridlab.study.comparison import Comparison, compare
    from hybridlab.study.config import RunConfig
    from hybridlab.study.run import train
    from hybridlab.study.study import Study, StudyResult
    from hybridlab.study.tasks import ImageTaskConfig, TextTaskConfig

__all__ = ["Comparison", "ImageTaskConfig", "RunConfig", "Study", "StudyResult", "TextTaskConfig", "compare", "train"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
