"""Whether the password of the tracking server withstands whoever guesses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cpfean.errors import ConfigError

PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # the variable that MLflow itself reads
ADMIN = "admin"
_LEAST = 12
_LEAST_GUESSES = 1e10  # tries, which take days where a password's hash is known
_LOOKED_AT = 72  # characters of a password; the estimate takes seconds on long ones
_OWN_WORDS = ("admin", "administrator", "mlflow", "cpfean", "tracking", "server")
_REPEATED = re.compile(r"(.+?)(?:[\W_]{0,2}\1)+[\W_]{0,2}", re.DOTALL)


def check_password(password: str, *, known: Sequence[str] = ()) -> None:
    """Raises ConfigError for a password that is absent, short or soon guessed.

    Whoever guesses has the `known` words, such as the name of the host.
    """
    if not password:
        raise ConfigError(
            f"--auth needs the password of the user {ADMIN!r} in {PASSWORD}: at least {_LEAST} "
            "characters, e.g. from `openssl rand -base64 24`."
        )
    if len(password) < _LEAST:
        raise ConfigError(f"{PASSWORD}: {len(password)} characters; {_LEAST} are the least.")
    words = [*_OWN_WORDS, *(part for name in known for part in re.split(r"[\W_]+", name) if part)]
    guesses, why = _guesses(password[:_LOOKED_AT], words)
    if guesses < _LEAST_GUESSES:
        raise ConfigError(
            f"{PASSWORD} is soon guessed: about {guesses:.0e} tries{why}. Take a random one, e.g. "
            "from `openssl rand -base64 24`."
        )


def _guesses(password: str, words: Sequence[str]) -> tuple[float, str]:
    """How many tries a password stands, and why so few, where that can be told."""
    from zxcvbn import zxcvbn

    repeated = _REPEATED.fullmatch(password.lower())
    if repeated is not None:
        unit = password[: len(repeated[1])]
        few, why = _guesses(unit, words)
        return 2 * few, why or ", since it says the same twice"
    # What everybody knows adds nothing: "MLflow-Admin-1" is "--1".
    rest = password
    for word in sorted(words, key=len, reverse=True):
        if len(word) > 2:
            rest = re.sub(re.escape(word), "", rest, flags=re.IGNORECASE)
    found = [zxcvbn(text, user_inputs=list(words)) for text in {password, rest} if text]
    weakest = min(found, key=lambda one: one["guesses"])
    if not rest:
        return 1.0, ", since it is made of the names of what it protects"
    warning = str(weakest["feedback"]["warning"]).rstrip(".")
    return float(weakest["guesses"]), f" ({warning})" if warning else ""
