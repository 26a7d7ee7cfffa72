"""LoRA: layers, adapter folders, and the comparison of a merged model with what it was made of."""

import logging
import sys

# peft imports bitsandbytes where it is installed. On some CPUs bitsandbytes then gets code from the Hugging Face hub
# through the package kernels, and warns without it. Nothing here uses that code, and no remote code is run.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
