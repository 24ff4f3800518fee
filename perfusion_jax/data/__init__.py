"""A concept's pictures, masks and prompts, on their way to the training step."""
