"""The colours of all pictures: told apart by everybody, in print and on a screen.

Source: M. Okabe, K. Ito, "Color Universal Design", 2008.
"""

BLUE, RED = "#0072B2", "#D55E00"
COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
