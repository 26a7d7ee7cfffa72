"""ChatGLM2 and ChatGLM3 as transformers' own GlmForCausalLM, which needs no remote code, and back.

No value of a weight changes: query_key_value is cut into three weights, the others get new names.
"""
