"""The programs that a person runs; lib/ is what they share."""
