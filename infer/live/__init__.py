"""The page of infer/demo.py: what it asks a model, and what it shows of the answer."""
