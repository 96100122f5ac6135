"""Training: data, sequences, loss, optimizer. Programs: train.py, scenes.py, nano.py, sprite_pack.py."""
