"""Effects with torch: the loop, the model, the loss, the optimizer, checkpoints."""
