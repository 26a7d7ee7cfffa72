"""How much memory a training needs, simulated from a trace on the meta device."""
