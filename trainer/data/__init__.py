"""Training data: records as users write them, tokenized examples, batches."""
