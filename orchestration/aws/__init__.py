"""Machines of AWS: spot first, and the notice that one will be taken away."""
