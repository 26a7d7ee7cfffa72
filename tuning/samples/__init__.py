"""From an instruction file to the batches of an epoch. Knows a tokenizer by its methods only."""
