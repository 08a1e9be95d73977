"""What the process that workers are forked from loads first; it never runs a task, so no thread of a library is alive."""

from __future__ import annotations

import safetensors  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
