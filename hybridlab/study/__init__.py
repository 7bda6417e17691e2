"""Studies: arms and seeds become runs, and runs become comparisons."""

from hybridlab.study.arms import Study, StudyResult
from hybridlab.study.comparison import Comparison, compare
from hybridlab.study.run_config import RunConfig
from hybridlab.study.tasks import ImageTaskConfig, TextTaskConfig
from hybridlab.study.training_run import train

__all__ = ["Comparison", "ImageTaskConfig", "RunConfig", "Study", "StudyResult", "TextTaskConfig", "compare", "train"]
