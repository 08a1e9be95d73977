"""What the process that workers are forked from loads first: most of what a stage imports, so that no worker has to.

A fork is safe only from a process with one thread. Nothing here starts any but the pools of OpenBLAS (numpy's and
scipy's), which end when the process forks and start again where they are used; a test counts the threads.
"""

from __future__ import annotations

import accelerate.big_modeling  # noqa: F401
import compressed_tensors.compressors  # noqa: F401
import safetensors.torch  # noqa: F401
import transformers.integrations.compressed_tensors
import transformers.masking_utils
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.quantizers.auto  # noqa: F401
