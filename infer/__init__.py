"""Programs a person runs: detect.py, evaluate.py."""
