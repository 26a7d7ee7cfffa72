"""LoRA layers, and adapters in peft's format."""

import logging
import sys

# peft imports bitsandbytes where it is installed. On some CPUs bitsandbytes then gets a kernel from the Hugging Face hub
# through the package kernels, and warns without it. Nothing here uses that kernel, and no remote code is run.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
