"""Perfusion's mathematics (arXiv 2305.01644): the gated rank-1 edit, concepts, and edits as parameter-tree transforms.

Needs JAX alone.
"""
