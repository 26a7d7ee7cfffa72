"""The three ChatGLM families. `MODE` has one row a family; --mode of every script chooses a row."""

from typing import NamedTuple

from .checkpoint import CheckpointError, check_family
from .glm import GLMConfig, GLMForConditionalGeneration, GLMTokenizer
from .glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer
from .glm3 import ChatGLM3Config, ChatGLM3ForConditionalGeneration, ChatGLM3Tokenizer


class Family(NamedTuple):
    config: type
    tokenizer: type
    model: type


MODE = {
    "glm": Family(GLMConfig, GLMTokenizer, GLMForConditionalGeneration),
    "glm2": Family(ChatGLM2Config, ChatGLM2Tokenizer, ChatGLM2ForConditionalGeneration),
    "glm3": Family(ChatGLM3Config, ChatGLM3Tokenizer, ChatGLM3ForConditionalGeneration),
}

__all__ = ["MODE", "CheckpointError", "Family", "check_family"]
