"""One training per class, scores of documents under every class, and Bayes' rule on top."""
