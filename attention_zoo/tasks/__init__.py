"""What is to be learned. A new task is one file here and one yaml in conf/task/."""

from attention_zoo.tasks.generated import Generated
from attention_zoo.tasks.mqar import Mqar
from attention_zoo.tasks.task import IGNORED, Batch, Batches, Task
from attention_zoo.tasks.text import Text

__all__ = ["IGNORED", "Batch", "Batches", "Generated", "Mqar", "Task", "Text"]
