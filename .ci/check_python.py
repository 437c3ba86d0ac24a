"""The message for a Python that is too old. This file must run on one."""

import sys

MIN_PYTHON = (3, 11)

wanted, here = (".".join(map(str, version)) for version in (MIN_PYTHON, sys.version_info[:3]))
sys.exit(
    sys.version_info < MIN_PYTHON
    and f"JLLM needs Python {wanted} or newer, and hatch runs on Python {here}. "
    "Install a newer one, and hatch with it: python3.12 -m pip install hatch"
)
