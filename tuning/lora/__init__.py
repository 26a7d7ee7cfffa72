"""LoRA: layers, adapter folders, and the comparison of a merged model with what it was made of."""
