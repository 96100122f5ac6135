"""What infer/doctor.py checks: the network, the cost of its answers, and a file of data."""
