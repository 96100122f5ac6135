"""How nano is made."""
