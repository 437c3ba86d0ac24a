"""What the contenders' seconds are: of the clock, or of the processor where other work shares the machine."""

import time
from typing import Any


def count_processor_time(task: dict[str, Any]) -> None:
    """Where a task asks for it, count what this process has of the processors, and not what passes meanwhile.

    Only for one thread: of several, the time that they wait for each other would count as well.
    """
    if task.get("processor_time"):
        # What is timed is timed by functions of other packages, which look the clock up here.
        time.perf_counter = time.process_time
