"""What tunes a model: samples, LoRA, the engine, the run around the loop, plan and evaluation. One room a job."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project's folder
