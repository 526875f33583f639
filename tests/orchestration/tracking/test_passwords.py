"""Passwords of the tracking server: weak ones are refused, whatever makes them weak."""

import secrets
import time

import pytest

from cpfean.errors import ConfigError
from orchestration.tracking.passwords import check_password


@pytest.mark.parametrize(
    ("password", "message"),
    [
        ("", "needs the password of the user 'admin'"),
        ("Zebra-58-or", "11 characters"),
        # Of twelve characters and more, and on every list.
        *((common, "soon guessed") for common in ("password1234", "qwerty123456", "unbelievable")),
        *((common, "soon guessed") for common in ("1q2w3e4r5t6y", "administrator", "iloveyou2024")),
        *((common, "soon guessed") for common in ("Passw0rd!2024", "Summer2024!!", "abcdefghijkl")),
        ("123456789012", "soon guessed"),
        # Said twice, with and without something in between.
        ("Kx9#mQKx9#mQ", "says the same twice"),
        ("x8Fk2pQzx8Fk2pQz", "says the same twice"),
        ("zebra58-zebra58", "says the same twice"),
        ("letmein-letmein", "soon guessed"),
        ("P@ssw0rdP@ssw0rd", "soon guessed"),
        ("aaaaaaaaaaaaaaaa", "soon guessed"),
        ("a" * 100_000, "soon guessed"),
        # Made of what is known of the server.
        ("mlflow-admin-1", "soon guessed"),
        ("MLflow-Admin-1", "soon guessed"),
        ("headnode-gpu-1", "soon guessed"),
        ("admin-cpfean-mlflow", "soon guessed"),
    ],
)
def test_weak_passwords_are_refused(password: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_password(password, known=["headnode-gpu.example.org"])
    assert not password or password not in str(refused.value)


@pytest.mark.parametrize(
    "password",
    [
        "Zebra-58-orb",
        "tulip-orbit-58-Zebra",
        "correcthorsebatterystaple",
        "über-Übung-äpfel-7",
        "Kx9#mQ2vL7pR",
        "tulip-orbit-58-Zebra" * 2,
    ],
)
def test_strong_passwords_are_taken(password: str) -> None:
    check_password(password)


def test_random_passwords_are_taken() -> None:
    for _ in range(100):
        check_password(secrets.token_urlsafe(9))


@pytest.mark.parametrize("password", [secrets.token_hex(50_000), "ab1!" * 50_000])
def test_a_long_password_takes_no_time(password: str) -> None:
    began = time.monotonic()
    try:
        check_password(password)
    except ConfigError:
        assert password.startswith("ab1!")
    assert time.monotonic() - began < 1.0
