"""What stands around the training loop: launch, log, validation, stops, training states, results."""
