"""Names that a file system allows, and that patterns, addresses and command lines read as something else."""

ODD_NAMES = ["[dog]", "*", "?", "%20", "#", "äöü", "a dog", "-dog", "**", "a:b", "{dog}", "~dog"]
