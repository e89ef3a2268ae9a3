"""What the notebooks of Part II draw, claim and say, a module for each chapter."""
