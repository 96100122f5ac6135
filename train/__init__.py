"""Training: the loop (fit.py), and rooms for what it needs."""
