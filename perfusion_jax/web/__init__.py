"""The studio: what its page shows, and what its buttons call."""
