"""Reading a forward function: what its contractions are, which belong together, what flows where."""
