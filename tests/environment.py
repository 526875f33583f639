"""The environment of the commands that tests start."""

import os

# Ray lets its workers give way to all other processes. Beside tests that compute they would hardly
# run at all: a sweep of a minute took ten.
FAIR = {"RAY_worker_niceness": "0"}


def of_a_user() -> dict[str, str]:
    """This process's, without what it says of clusters and trackers."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
