"""The URL of a database: other tools' spellings, and every part in SQLAlchemy's form."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, make_url

from polytower.errors import UserError
from polytower.settings import settings
from polytower.url import normalised, parts, shown, sqlalchemy_url

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_schemes_of_other_tools_are_taken(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", f"{scheme}://u:p@h/d")
    assert settings().database_url == "postgresql://u:p@h/d"


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/d", "postgresql://u:sec ret%@h/d", "postgresql://h/d?sslmod=secret"]
)
def test_what_is_no_url_is_refused_without_quoting_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", url)
    with pytest.raises(UserError, match="POLYTOWER_DATABASE_URL") as refusal:
        settings()
    assert "sec" not in str(refusal.value)


@given(
    words,
    words,
    words,
    st.dictionaries(st.sampled_from(["options", "sslrootcert", "sslmode", "channel_binding", "krbsrvname"]), words),
)
def test_every_part_reaches_sqlalchemy(user: str, password: str, database: str, query: dict[str, str]) -> None:
    query |= {"target_session_attrs": "read-write"}
    user, password, database = (quote(each, safe="") for each in (user, password, database))
    arguments = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
    url = normalised(f"postgres://{user}:{password}@one:1,two:2/{database}?{arguments}")
    made = make_url(sqlalchemy_url(url))
    _, sent = create_engine(made).dialect.create_connect_args(made)
    assert {name: str(value) for name, value in sent.items() if name != "context"} == parts(url)


def test_people_are_shown_no_secrets() -> None:
    assert shown("postgresql://u:secret@h:1/d?sslpassword=secret") == "postgresql://u@h:1/d"


def test_a_socket_is_a_host() -> None:
    made = make_url(sqlalchemy_url("postgresql:///d?host=/run/postgresql&user=u"))
    _, sent = create_engine(made).dialect.create_connect_args(made)
    assert (sent["host"], sent["user"], sent["dbname"]) == ("/run/postgresql", "u", "d")
