"""torchtune's configurations, read and translated into our own options. Torch-free; nothing named in one is imported."""
