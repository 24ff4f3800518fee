"""The emoji world: the small text-to-image model that ships with the package, and how it was made."""
