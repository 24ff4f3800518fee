"""Learning concepts: the step, the loop around it, what they read, and what they write."""
