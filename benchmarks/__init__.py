"""Side-by-side measurements: everything that is compared is measured in one run, in turns."""
