"""Who may do what, and what hostile input gets: every route, every field."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from cxrbatch.errors import Fatal  # noqa: E402
from cxrbatch.imaging.limits import Limits  # noqa: E402
from cxrbatch.ops.review import new_user  # noqa: E402
from cxrbatch.review.app import create_app, make_templates  # noqa: E402
from cxrbatch.review.decoding import ImageDecoder  # noqa: E402
from cxrbatch.review.filters import parse_cursor  # noqa: E402
from cxrbatch.review.overlay_process import HeatMaps  # noqa: E402
from cxrbatch.review.state import State  # noqa: E402
from cxrbatch.settings import Settings  # noqa: E402
from cxrbatch.store import ReviewAction, Store, migrate  # noqa: E402
from cxrbatch.store.connection import connect  # noqa: E402
from cxrbatch.store.rounds import NewRound, create_round  # noqa: E402
from cxrbatch.store.schema import files  # noqa: E402
from cxrbatch.store.users import set_disabled  # noqa: E402
from cxrbatch.store.work_list import Filters  # noqa: E402
from fork_server import cxrbatch  # noqa: E402
from review_server import PASSWORD, USERS, fill, make_users, serving  # noqa: E402
from store_images import OTHER_CASCADE, begin, reject, review  # noqa: E402

BASE = "http://127.0.0.1:8321"
HOSTILE = [
    "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "'; DROP TABLE reviews; --", "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>', "%00", "\0", "{{7*7}}", "A" * 3000, "𝔘𝔫𝔦", "9" * 40, "-1", "1e400", "NaN",
]  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> Iterator[ImageDecoder]:
    made = ImageDecoder(Limits(), workers=1, timeout_s=60, memory_mib=4096)
    yield made
    made.close()


def open_app(folder: Path, decoder: ImageDecoder, answers: Any = None) -> tuple[Any, Store]:
    url = f"sqlite:///{folder / 'store.db'}"
    store = Store.open(url)
    fill(store, folder / "incoming", answers=answers)
    make_users(store)
    state = State(Settings(db=url), store, decoder, HeatMaps("default"), make_templates())
    return create_app(state), store


@pytest.fixture(scope="module")
def app_and_store(tmp_path_factory: pytest.TempPathFactory, decoder: ImageDecoder) -> Iterator[tuple[Any, Store]]:
    app, store = open_app(tmp_path_factory.mktemp("review"), decoder)
    yield app, store
    store.close()


class Client:
    """A browser of few words: cookies, Origin and the CSRF token of its session."""

    def __init__(self, app: Any, name: str = "", accept: str = "text/html") -> None:
        from starlette.testclient import TestClient

        self.http = TestClient(app, base_url=BASE, follow_redirects=False, headers={"accept": accept})
        self.csrf = ""
        if name:
            answer = self.post("/login", {"name": name, "password": PASSWORD})
            assert answer.status_code == 303, answer.text
            found = re.search(r'name="csrf" content="(\w+)"', self.get("/images").text)
            assert found
            self.csrf = found[1]

    def get(self, path: str, **more: Any) -> Any:
        return self.http.get(path, **more)

    def post(self, path: str, data: dict[str, Any], **headers: str) -> Any:
        given = {"origin": BASE, **headers}
        return self.http.post(path, data={"csrf": self.csrf} | data, headers=given)

    def post_json(self, path: str, document: Any, **headers: str) -> Any:
        given = {"origin": BASE, "x-csrf-token": self.csrf, "accept": "application/json", **headers}
        return self.http.post(path, json=document, headers=given)


PUBLIC = {"/login", "/enter", "/static"}


def routes(app: Any) -> list[tuple[str, str]]:
    found = []
    for route in every_route(app.routes):
        for method in sorted((getattr(route, "methods", None) or {"GET"}) - {"HEAD"}):
            path = re.sub(r"\{\w+\}", "1", route.path)
            if route.path not in PUBLIC:
                found.append((method, path))
    return found


def every_route(listed: Any) -> Iterator[Any]:
    for route in listed:
        inner = getattr(getattr(route, "original_router", None), "routes", None) or getattr(
            route, "included_routes", None
        )
        if inner:
            yield from every_route(inner)
        elif hasattr(route, "path"):
            yield route


def test_every_route_wants_a_session(app_and_store: tuple[Any, Store]) -> None:
    app, _ = app_and_store
    listed = routes(app)
    assert len(listed) >= 20, listed
    for method, path in listed:
        for cookie in ("", "x" * 43):
            client = Client(app, accept="application/json")
            client.http.cookies.set("cxrbatch_session", cookie)
            answer = client.http.request(method, path, headers={"origin": BASE})
            assert answer.status_code == 401, (method, path, answer.status_code)
    page = Client(app).get("/images")
    assert (page.status_code, page.headers["location"]) == (303, "/login")


def test_every_write_wants_its_own_token_and_origin(app_and_store: tuple[Any, Store]) -> None:
    app, _ = app_and_store
    mine, other = Client(app, "chief"), Client(app, "dr_a")
    for method, path in routes(app):
        if method != "POST":
            continue
        for token, origin in ((other.csrf, BASE), ("", BASE), (mine.csrf, "http://evil.example"), (mine.csrf, "null")):
            answer = mine.http.post(path, data={"csrf": token}, headers={"origin": origin})
            assert answer.status_code == 403, (path, origin)
        assert mine.http.post(path, data={"csrf": mine.csrf}).status_code == 403, "no Origin at all"
        assert mine.http.post(path, content=b"x" * 300_000, headers={"origin": BASE}).status_code == 413


def test_a_reader_may_not_do_what_an_administrator_does(app_and_store: tuple[Any, Store]) -> None:
    app, _ = app_and_store
    reader = Client(app, "dr_a")
    assert reader.post("/rounds", {"name": "mine", "readers": "dr_a"}).status_code == 403
    assert reader.post("/rounds/1/close", {}).status_code == 403
    assert reader.get("/rounds/1/decide/1").status_code == 403
    assert reader.get("/api/rounds/1/decide/1").status_code == 403


def test_error_pages_say_who_is_logged_in(app_and_store: tuple[Any, Store]) -> None:
    app, _ = app_and_store

    def fails() -> None:
        raise RuntimeError("no business of the reader")

    app.add_api_route("/fails", fails)
    client = Client(app, "dr_a")
    made = client.http.post("/rounds", data={"csrf": client.csrf}, headers={"origin": BASE})  # what answers a form
    for answer, status in ((client.http.get("/nowhere"), 404), (client.http.get("/fails"), 500), (made, 403)):
        assert answer.status_code == status
        assert "dr_a" in answer.text and "Log out" in answer.text and "no business" not in answer.text
        assert answer.headers["x-frame-options"] == "DENY"
    assert "Log out" not in Client(app).http.get("/nowhere").text


def test_answers_are_guarded(app_and_store: tuple[Any, Store]) -> None:
    app, _ = app_and_store
    client = Client(app, "dr_a")
    cookie = client.post("/login", {"name": "dr_a", "password": PASSWORD}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    for path in ("/images", "/api/images/1", "/static/review.css", "/nowhere", "/images/1"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == ("no-cache" if path.startswith("/static") else "no-store")
    for path in ("/images", "/rejected", "/rounds", "/reports", "/images/1", "/login"):
        text = client.get(path).text
        assert (
            "<style" not in text
            and " style=" not in text
            and not re.search(r"<script(?! src=| type=\"module\" src=)", text)
        )
        assert "://" not in text, "nothing from another host"
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404


def test_wrong_passwords_are_slowed_down_and_tell_nothing(app_and_store: tuple[Any, Store]) -> None:
    app, store = app_and_store
    client = Client(app)
    known = [client.post("/login", {"name": "dr_b", "password": "wrong"}) for _ in range(2)]
    unknown = client.post("/login", {"name": "nobody", "password": "wrong"})
    assert {answer.status_code for answer in [*known, unknown]} == {403}
    assert known[0].text.replace('value="dr_b"', 'value="nobody"') == unknown.text
    for _ in range(4):
        client.post("/login", {"name": "dr_b", "password": "wrong"})
    assert client.post("/login", {"name": "dr_b", "password": PASSWORD}).status_code == 429
    from cxrbatch.store.users import forget_failures

    for key in ("user dr_b", "address testclient", "user nobody"):
        forget_failures(store, key)
    set_disabled(store, "dr_b", True)
    assert client.post("/login", {"name": "dr_b", "password": PASSWORD}).status_code == 403
    set_disabled(store, "dr_b", False)
    forget_failures(store, "user dr_b")
    forget_failures(store, "address testclient")


def test_typing_errors_of_many_readers_do_not_add_up(app_and_store: tuple[Any, Store]) -> None:
    app, _ = app_and_store
    client = Client(app)
    for day in range(3):
        for number in range(3):
            client.post("/login", {"name": f"reader {day} {number}", "password": "wrong"})
        assert client.post("/login", {"name": "dr_a", "password": PASSWORD}).status_code == 303


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_in_every_field_is_a_sentence_and_never_markup(
    app_and_store: tuple[Any, Store], text: str
) -> None:
    app, store = app_and_store
    client = Client(app, "chief")
    fields = (
        "decision", "label", "label_set", "reason", "flag", "min_confidence", "max_confidence", "since", "until",
        "folder", "reader", "reviewed", "sort", "disagreement", "after", "before", "round", "key", "size",
    )  # fmt: skip
    for path in ("/images", "/rejected", "/rounds", "/reports", "/api/images/1", "/images/1", "/enter"):
        answer = client.get(path, params=dict.fromkeys(fields, text))
        assert answer.status_code < 500, (path, answer.text[:200])
        assert "<script>alert" not in answer.text and "<img src=x" not in answer.text and "root:" not in answer.text
    assert parse_cursor("0001-01-01T00:00:00+23:00~1", Filters(sort="newest")) is None
    for path in (f"/images/{text}", f"/api/images/{text}/pixels", f"/static/{text}", f"/rounds/{text}/read/{text}"):
        path = path.replace("\0", "%00")
        answer = client.get(path.encode("ascii", "ignore").decode() if "%" not in path else path)
        assert answer.status_code in (303, 307, 400, 403, 404, 414, 422), path
        assert "root:" not in answer.text
    form = {"name": text, "readers": text, "size": text, "seed": text, "folder": text, "file": text, "reason": text}
    for path in ("/rounds", "/rejected/retry", "/rounds/1/close"):
        assert client.post(path, form).status_code < 500
    state = client.get("/api/images/2", headers={"accept": "application/json"}).json()
    body = {"act_id": text, "action": text, "label": text, "comment": text, "shown": text, "signature": text}
    assert client.post_json("/api/acts", body).status_code in (400, 409, 422)
    good = {
        "act_id": "0" * 20,
        "action": "override",
        "label": text,
        "shown": state["shown"],
        "signature": state["signature"],
    }
    assert client.post_json("/api/acts", good).status_code in (400, 422)
    forged = good | {"label": "NORMAL", "shown": state["shown"].replace("[2,", "[3,")}
    assert client.post_json("/api/acts", forged).status_code == 409
    assert len(list(store.results())) == 8


def test_hostile_names_are_shown_as_text(app_and_store: tuple[Any, Store], tmp_path: Path) -> None:
    app, store = app_and_store
    name = "<img src=x onerror=alert(1)>\"'&.dcm"
    run = begin(store)
    store.record(run.run_id, run.cascade_id, [reject(f"/in/{name}")])
    text = Client(app, "chief").get("/rejected").text
    assert "&lt;img src=x" in text and "<img src=x" not in text
    with connect(store.engine, write=True) as connection:
        connection.execute(sa.delete(files).where(files.c.path == f"/in/{name}"))


def test_a_retry_that_waits_for_the_store_holds_up_nobody(
    app_and_store: tuple[Any, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = app_and_store
    client, loops = Client(app, "dr_a"), list[bool]()

    def retry(*_: Any) -> int:
        loops.append(asyncio._get_running_loop() is not None)
        return 1

    for name in ("retry_file", "retry_now", "write_audit"):
        monkeypatch.setattr(f"cxrbatch.review.work_list.{name}", lambda *_, **__: retry())
    for given in ({"file": "1"}, {"reason": "truncated"}):
        assert client.post("/rejected/retry", given).status_code == 303
    assert loops == [False] * 4, "the event loop serves everybody"


def test_a_folder_of_the_list_may_be_a_bucket(tmp_path: Path, decoder: ImageDecoder) -> None:
    app, store = open_app(tmp_path, decoder)
    with store:
        with connect(store.engine, write=True) as connection:
            connection.execute(sa.update(files).where(files.c.image_id == 2).values(path="s3://bucket/in/image_1.png"))
        client = Client(app, "dr_a")
        for folder in ("s3://bucket", "s3://bucket/in/"):
            assert 'data-id="2"' in client.get("/images", params={"folder": folder}).text
        assert "lies in a bucket" in pixels(client, 2).json()["detail"]


def pixels(client: Client, image_id: int, size: str = "reduced") -> Any:
    return client.get(f"/api/images/{image_id}/pixels?size={size}", headers={"accept": "application/json"})


def test_pixels_are_those_of_the_file_and_only_of_the_file(tmp_path: Path, decoder: ImageDecoder) -> None:
    app, store = open_app(tmp_path, decoder)
    with store:
        client = Client(app, "dr_a")
        body = pixels(client, 2).content
        length = int.from_bytes(body[:4], "little")
        head = json.loads(body[4 : 4 + length])
        assert (head["rows"], head["columns"], head["step"]) == (96, 80, 1)
        assert pixels(client, 2, "larger%00").status_code == 422
        assert len(body) == 4 + length + head["greys"] + 2 * 96 * 80
        assert pixels(client, 1, "full").status_code == 200
        assert pixels(client, 999).status_code == 404
        path = tmp_path / "incoming" / "image_3.png"
        shutil.copy(tmp_path / "incoming" / "image_4.png", path)
        changed = pixels(client, 4)
        assert (changed.status_code, changed.json()["detail"]) == (
            409, "The file has other bytes than when it was scored.",
        )  # fmt: skip
        (tmp_path / "incoming" / "image_5.png").unlink()
        assert pixels(client, 6).json()["detail"] == "The file is gone."
        assert client.get("/api/images/6", headers={"accept": "application/json"}).status_code == 200, "its row stays"


def test_a_blinded_reader_gets_the_same_bytes_whatever_the_model_said(tmp_path: Path, decoder: ImageDecoder) -> None:
    """Two stores that differ in nothing but the model's answers: every answer to the reader is the same."""
    traffic = []
    for name, answers in (
        ("one", [("NORMAL", 0.31), ("NORMAL", 0.32), ("COVID19", 0.33), ("PNEUMONIA", 0.34)]),
        ("two", [("TUBERCULOSIS", 0.61), ("COVID19", 0.32), ("NORMAL", 0.93), ("COVID19", 0.35)]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        app, store = open_app(folder, decoder, answers)
        with store:
            chief = Client(app, "chief")
            fields = {
                "name": "round",
                "readers": ["dr_a", "dr_b"],
                "blinded": "1",
                "decision": "needs_review",
                "seed": "5",
            }
            assert chief.post("/rounds", fields).status_code == 303
            reader = Client(app, "dr_a", accept="application/json")
            heard: list[str] = []

            def keep(answer: Any, heard: list[str] = heard, folder: Path = folder) -> Any:
                kept = {k: v for k, v in answer.headers.items() if k not in ("set-cookie", "content-length")}
                text = answer.content.decode("latin-1")
                text = re.sub(
                    r'"(signature|opened_at)": ?"[^"]*"|20\d\d-\d\d-\d\dT[\d:.+]*|\b[0-9a-f]{64}\b'
                    r"|\d\d-\d\d \d\d:\d\d",
                    "*",
                    text,
                )
                text = text.replace(str(folder), "FOLDER")
                heard.append(f"{answer.status_code} {sorted(kept.items())} {text}")
                return answer

            for path in (
                "/images",
                "/images?label=NORMAL",
                "/images?max_confidence=0.5",
                "/rounds",
                "/rounds/1",
                "/reports",
            ):
                keep(reader.get(path, headers={"accept": "text/html"}))
            for position in (1, 2, 3, 4):
                state = keep(reader.get(f"/api/rounds/1/read/{position}")).json()
                keep(reader.get(f"/rounds/1/read/{position}", headers={"accept": "text/html"}))
                keep(pixels(reader, state["id"]))
                keep(reader.post_json(f"/api/images/{state['id']}/opened", {}))
                for other in ("", "/overlay"):
                    refused = keep(reader.get(f"/api/images/{state['id']}{other}"))
                    assert refused.status_code == 403
                keep(reader.get(f"/images/{state['id']}", headers={"accept": "text/html"}))
                act = {"act_id": f"act-number-{position}", "action": "override", "label": "NORMAL"}
                act |= {"shown": state["shown"], "signature": state["signature"]}
                keep(reader.post_json("/api/acts", act))
                accept = act | {"act_id": f"accept-it-{position}", "action": "accept"}
                keep(reader.post_json("/api/acts", accept))
                keep(reader.get(f"/api/rounds/1/read/{position}"))
            keep(reader.get("/reports?round=1"))
            keep(reader.get("/reports/report.csv?round=1"))
            keep(reader.get("/images?reviewed=mine", headers={"accept": "text/html"}))
        traffic.append(heard)
    assert len(traffic[0]) > 40
    for one, two in zip(*traffic, strict=True):
        assert one == two
    joined = "\n".join(traffic[0])
    assert not re.search(r"0\.3[1234]\b|image_[0-3]\.", joined)


def test_a_blinded_reader_may_give_every_label_that_is_offered(tmp_path: Path, decoder: ImageDecoder) -> None:
    app, store = open_app(tmp_path, decoder)
    with store:
        create_round(store, NewRound("Blinded", ("dr_a",), Filters(), "{}", 1, reads_per_image=1), "chief")
        classes = '{"stages": [{"role": "disease", "classes": ["NORMAL", "EFFUSION"]}]}'
        begin(store, dataclasses.replace(OTHER_CASCADE, manifest_json=classes))
        reader = Client(app, "dr_a", accept="application/json")
        state = reader.get("/api/rounds/1/read/1").json()
        for number, choice in enumerate(state["choices"]):
            act = {"act_id": f"act-number-{number}", "action": "override", "label": choice["label"]}
            act |= {"shown": state["shown"], "signature": state["signature"]}
            answer = reader.post_json("/api/acts", act)
            assert answer.status_code == 200, (choice, answer.text)


def test_a_round_can_be_drawn_by_every_filter_of_the_list(app_and_store: tuple[Any, Store]) -> None:
    page = Client(app_and_store[0], "chief").get("/rounds").text
    wanted = {each.name for each in dataclasses.fields(Filters)} - {"sort", "disagreement"}
    assert wanted <= set(re.findall(r'name="(\w+)"', page))


def test_the_proxy_says_who_reads_whatever_cookie_the_browser_has(tmp_path: Path, decoder: ImageDecoder) -> None:
    from starlette.testclient import TestClient

    url = f"sqlite:///{tmp_path / 'store.db'}"
    with Store.open(url) as store:
        fill(store, tmp_path / "incoming")
        make_users(store)
        settings = Settings(db=url, review_user_header="x-user", review_trusted_proxies=("127.0.0.0/8",))
        app = create_app(State(settings, store, decoder, HeatMaps("default"), make_templates()))
        browser = TestClient(app, base_url=BASE, client=("127.0.0.1", 1), follow_redirects=False)
        for name in ("chief", "dr_a", "chief"):
            page = browser.get("/images", headers={"x-user": name, "accept": "text/html"})
            assert f">{name}</span>" in page.text
        assert browser.get("/images", headers={"accept": "text/html"}).status_code == 303, "logged out at the proxy"
        stranger = TestClient(app, base_url=BASE, client=("192.0.2.1", 1), follow_redirects=False)
        assert stranger.get("/images", headers={"x-user": "chief", "accept": "text/html"}).status_code == 303


def test_an_address_that_a_request_names_makes_no_proxy_of_its_sender(tmp_path: Path) -> None:
    """uvicorn took X-Forwarded-For of this machine for the peer: naming a listed address was enough."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        fill(store, tmp_path / "incoming")
        make_users(store)
    proxy = {"CXRBATCH_REVIEW_USER_HEADER": "x-user", "CXRBATCH_REVIEW_TRUSTED_PROXIES": '["127.0.0.1"]'}
    stranger = proxy | {"CXRBATCH_REVIEW_TRUSTED_PROXIES": '["10.0.0.2"]'}
    for environment, status in ((proxy, 200), (stranger, 303)):
        with serving(url, tmp_path, **environment) as server:
            headers = {"x-user": "chief", "x-forwarded-for": "10.0.0.2", "accept": "text/html"}
            assert httpx.get(server.address + "/images", headers=headers).status_code == status


def test_the_report_of_another_round_says_nothing_of_a_blinded_image(tmp_path: Path, decoder: ImageDecoder) -> None:
    app, store = open_app(tmp_path, decoder)
    with store:
        filters = Filters(decision="needs_review")
        for name, blinded in (("blind", True), ("open", False)):
            new = NewRound(name, ("dr_a", "dr_b"), filters, "{}", 6, blinded=blinded)
            create_round(store, new, "chief")
        for image_id in range(1, 7):
            review(store, image_id, "dr_b", ReviewAction.ACCEPT, shown_label="COVID19", round_id=2)
        report = "/reports/report.csv?round=2"
        assert "sensitivity,COVID19" in Client(app, "chief").get(report).text
        assert "COVID19" not in Client(app, "dr_a").get(report).text


def test_the_command_refuses_what_is_not_safe(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    missing = cxrbatch("--db", url, "review", cwd=tmp_path)
    assert (missing.returncode, "There is no store" in missing.stderr) == (1, True)
    migrate.upgrade(url, "0003")
    behind = cxrbatch("--db", url, "review", cwd=tmp_path)
    assert (behind.returncode, "cxrbatch db upgrade" in behind.stderr) == (10, True)
    migrate.upgrade(url)
    public = cxrbatch("--db", url, "review", "--host", "0.0.0.0", cwd=tmp_path)
    assert (public.returncode, "review add-user" in public.stderr) == (1, True)
    short = cxrbatch("--db", url, "review", "add-user", "dr_a", cwd=tmp_path, given="short\n")
    assert (short.returncode, "10 to 200 characters" in short.stderr) == (1, True)
    added = cxrbatch("--db", url, "review", "add-user", "dr_a", cwd=tmp_path, given=PASSWORD + "\n")
    nowhere = cxrbatch("--db", url, "review", "--host", "10.0.0..5", cwd=tmp_path)
    assert (nowhere.returncode, "There is no address 10.0.0..5" in nowhere.stderr) == (2, True)
    assert (added.returncode, added.stdout) == (0, "dr_a may log in.\n")
    assert "already" in cxrbatch("--db", url, "review", "add-user", "dr_a", cwd=tmp_path, given=PASSWORD + "\n").stderr
    assert cxrbatch("--db", url, "review", "users", cwd=tmp_path).stdout == "dr_a\treader\n"


def test_no_password_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end_of_input(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", end_of_input)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(Fatal, match="nothing was changed"):
        new_user(Settings(db=f"sqlite:///{tmp_path / 's.db'}"), "dr_a", admin=False)


def test_without_users_the_printed_address_opens_the_review_here(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        fill(store, tmp_path / "incoming")
    with serving(url, tmp_path) as server:
        base = server.address.partition("/enter")[0]
        with httpx.Client(headers={"accept": "text/html"}) as client:
            assert client.get(base + "/images").status_code == 303
            assert client.get(base + "/enter?key=guess").status_code == 403
            assert client.get(server.address).status_code == 303
            assert client.get(base + "/images").status_code == 200
        with Store.open(url) as store:
            make_users(store)
        assert httpx.get(server.address).status_code == 403, "not once somebody can log in"
        with Store.open(url) as store:
            for name in USERS:
                set_disabled(store, name, True)
        assert httpx.get(server.address).status_code == 303, "nobody can any more"
        assert server.stop() == 0


def test_a_browser_may_open_the_address_before_the_server_serves() -> None:
    from cxrbatch.ops.review import _listening

    with _listening("127.0.0.1", 0) as listener:
        socket.create_connection(listener.getsockname(), timeout=5).close()


def test_the_review_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, cxrbatch.ops.review; print([m for m in ('torch', 'openvino', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
