"""Files that concepts are kept in."""
