"""The practice set: scenes drawn by the program, and what is asked about them."""
