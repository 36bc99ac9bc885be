"""Cloud TPU slices: their names, the commands that make and use them, and the loop over both."""
