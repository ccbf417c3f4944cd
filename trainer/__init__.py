"""One fine-tuning run: config, data, losses, recipe, run folder. Knows no HTTP and no database."""
