"""torchtune's configurations in our own terms. Torch-free."""
