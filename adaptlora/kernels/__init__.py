"""The Triton kernels. Their files are `kernels/` at the root of the repository; a checkout finds them there.

An installed package has them in this folder. Nothing here imports triton: a kernel's module does, when a tensor needs it.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2] / "kernels"
# A folder `kernels` beside an installed package is another project's, so look for a file that only ours has.
if (_CHECKOUT / "lora_linear.py").is_file():
    __path__.append(str(_CHECKOUT))
