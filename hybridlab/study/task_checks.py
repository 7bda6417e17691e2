"""What a task could not be trained on, said before anything trains."""

from __future__ import annotations

from hybridlab.base.errors import UserError
from hybridlab.base.text_file import unreadable
from hybridlab.planner.architectures import CausalLM
from hybridlab.study.tasks import HuggingFaceTaskConfig, TaskConfig, TokenWindows


def check_task(task: TaskConfig) -> None:
    """Raise UserError for a text that is not UTF-8, and for windows longer than a config of Hugging Face takes.

    Of a text that `max_bytes` cuts, the loader leaves out what it cannot decode.
    """
    if isinstance(task, TokenWindows) and task.max_bytes and (said := unreadable(task.data, task.max_bytes)):
        raise UserError(said)
    if not isinstance(task, HuggingFaceTaskConfig):
        return
    longest = CausalLM(task.model_config()).longest
    if longest is not None and task.block_size > longest:
        name = "max_position_embeddings (GPT-2's n_positions)"
        raise UserError(
            f"block_size is {task.block_size}, the config's {name} {longest}: lower the one or raise the other"
        )
