"""How the model that ships was made: the drawn world, and what is trained on it. No part of the package."""
