"""Fine-tuning jobs: the store, the queue, and the trainers that are started and watched. Torch-free."""
