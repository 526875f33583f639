"""Training and evaluation of the whole model, in this process or one of several."""
