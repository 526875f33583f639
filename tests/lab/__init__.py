"""A lab of hosts on one machine: `python -m tests.lab up`. See `tests.lab.hosts`."""
