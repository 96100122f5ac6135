"""Look inside: one answer about one picture, with all that led to it, as a page for a browser."""
