"""What is passed on of a library's message."""

import pytest

from cpfean.errors import message_of


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "RuntimeError"),
        ("no such device", "no such device"),
        ("schema is old (found a,\nexpected b).\n\n  Run `db upgrade`", None),
        ("database is locked\n[SQL: INSERT ...]\n[parameters: (1,)]", "database is locked"),
    ],
)
def test_a_message_is_told_whole_and_on_one_line(text: str, message: str | None) -> None:
    whole = " ".join(text.split()) if message is None else message
    assert message_of(RuntimeError(text)) == whole


def test_a_message_of_pages_is_cut_behind_a_sentence_and_the_remedy_before_it_stays() -> None:
    remedy = "Take a backup, then run `mlflow db upgrade URI`."
    told = message_of(RuntimeError(f"{'It is old. ' * 20}{remedy} {'More of it. ' * 500}"))
    assert remedy in told
    assert told.endswith("More of it. ...")
    assert len(told) < 1300
