"""Other libraries' training loops with jumps, predicted depth, the panel and a record: Hugging Face and Lightning."""

from typing import TYPE_CHECKING

from hybridlab.base.lazy import lazy_exports

if TYPE_CHECKING:
    from hybridlab.integrations.lightning import HybridModule
    from hybridlab.integrations.recorded_loop import RecordedLoop
    from hybridlab.integrations.transformers import HybridTraining

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
