"""Text in, token batches out: where documents are read, what is done to them, how they are kept."""
