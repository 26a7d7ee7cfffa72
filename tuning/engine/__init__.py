"""DeepSpeed: its configuration, changes to it, and models that are loaded into it and saved from it."""
