"""Prompts, seeds and concepts to pictures."""
