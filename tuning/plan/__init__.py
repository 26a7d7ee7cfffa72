"""How much memory a training needs, from a trace on the meta device."""
