"""`cxrbatch review`, put together: the store, the decoder, the web server; and its users."""

from __future__ import annotations

import getpass
import ipaddress
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import uvicorn

from cxrbatch.decoding.memory import worker_memory_mib
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.imaging.limits import limits_of
from cxrbatch.ops.health import Health
from cxrbatch.ops.terminal import tell, user_name
from cxrbatch.review.app import create_app, make_templates
from cxrbatch.review.auth import check_new_password, hash_password
from cxrbatch.review.decoding import ImageDecoder
from cxrbatch.review.overlay_process import HeatMaps
from cxrbatch.review.state import State
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.store.review_images import write_audit
from cxrbatch.store.review_schema import Role
from cxrbatch.store.users import add_user, list_users, set_disabled, set_password_hash

__all__ = ["change_password", "close_user", "new_user", "print_users", "run_review"]

_NAME_CHARACTERS = 60


def run_review(settings: Settings, host: str, port: int, metrics: str = "") -> ExitCode:
    """Serve until SIGINT or SIGTERM.

    Raises Fatal for a store that is not at head (exit 10), another address than this machine's while nobody can log in,
    and an address that cannot be had.
    """
    with Store.open(settings.db, may_create=False) as store:
        has_users = any(not user.disabled for user in list_users(store))
        if not has_users and not _is_loopback(host):
            raise Fatal(
                f"The review does not open on {host} while nobody can log in: `cxrbatch review add-user NAME` first."
            )
        key = "" if has_users else secrets.token_urlsafe(24)
        with (
            _listening(host, port) as listener,
            _decoder(settings) as decoder,
            _monitor(metrics, store, decoder),
            closing(HeatMaps(settings.cascade)) as heat_maps,
        ):
            user = user_name()
            state = State(settings, store, decoder, heat_maps, make_templates(), key, user)
            address = _address(host, listener.getsockname()[1])
            tell(f"Open {address}" + (f"/enter?key={key}" if key else ""))
            if key:
                tell(f"The store has no users: whoever has this address reads as {user}.")
            elif not _is_loopback(host):
                tell("Passwords travel in clear over http: put a proxy with TLS in front.", "yellow")
            config = uvicorn.Config(
                create_app(state),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # uvicorn believes whoever is on this machine; auth.py, who is in our settings
                timeout_graceful_shutdown=5,
            )
            # uvicorn raises the signal that ended it once more: by then everything is closed.
            signal.signal(signal.SIGTERM, lambda *_: None)
            uvicorn.Server(config).run(sockets=[listener])
    return ExitCode.OK


@contextmanager
def _monitor(address: str, store: Store, decoder: ImageDecoder) -> Iterator[None]:
    """Metrics and health beside the review: what the store says, and that this process answers and can decode."""
    if not address:
        yield
        return
    from cxrbatch.ops.metrics import Metrics
    from cxrbatch.ops.monitor import StoreFigures, serve_monitor

    metrics, health, stop = Metrics(), Health(), threading.Event()
    health.begin("store")
    health.add("decoder", decoder.last_alive, 0.0)  # a thread that has ended does not come back
    with serve_monitor(address, metrics, health):
        figures = StoreFigures(store, metrics, health, {}, (health.heartbeat,))
        thread = threading.Thread(target=figures.run, args=(stop,), name="store-figures", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(2)


@contextmanager
def _decoder(settings: Settings) -> Iterator[ImageDecoder]:
    decoder = ImageDecoder(
        limits_of(settings),
        workers=settings.review_workers,
        timeout_s=settings.decode_timeout_s,
        memory_mib=settings.worker_memory_mib or worker_memory_mib(settings.review_workers),
    )
    try:
        yield decoder
    finally:
        decoder.close()


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
    except (OSError, UnicodeError) as error:  # UnicodeError: "10.0.0..5"
        why = getattr(error, "strerror", None) or "no name is like that"
        raise Fatal(
            f"There is no address {host} ({why}): name one of this machine with --host.", ExitCode.USAGE
        ) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # the address is printed before uvicorn serves: whoever opens it waits, and isn't refused
        except OSError as error:
            raise Fatal(f"The review cannot listen on {host}:{port} ({error.strerror}): name another --port.") from None
        yield listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def new_user(settings: Settings, name: str, *, admin: bool) -> None:
    """Ask for a password twice (or read one line where the input is no terminal) and make the user."""
    if not name.strip() or len(name) > _NAME_CHARACTERS or not name.isprintable() or "," in name:
        raise Fatal(f"A name has 1 to {_NAME_CHARACTERS} printable characters and no comma.", ExitCode.USAGE)
    with Store.open(settings.db) as store:
        if name in {user.name for user in list_users(store)}:
            raise Fatal(f"There is a user {name!r} already; `cxrbatch review set-password` changes the password.")
        add_user(store, name, hash_password(_ask_password()), Role.ADMIN if admin else Role.READER)
        write_audit(store, user_name(), "user_added", detail=name)
    print(f"{name} may log in{' as an administrator' if admin else ''}.")


def change_password(settings: Settings, name: str) -> None:
    with Store.open(settings.db, may_create=False) as store:
        set_password_hash(store, name, hash_password(_ask_password()))
        write_audit(store, user_name(), "password_changed", detail=name)
    print(f"The password of {name} is changed, and open sessions have ended.")


def close_user(settings: Settings, name: str, *, again: bool) -> None:
    with Store.open(settings.db, may_create=False) as store:
        set_disabled(store, name, not again)
        write_audit(store, user_name(), "user_enabled" if again else "user_disabled", detail=name)
    print(f"{name} may log in again." if again else f"{name} may log in no more, and open sessions have ended.")


def print_users(settings: Settings) -> None:
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        users = list_users(store)
    for user in users:
        print(user.name, user.role, *(["disabled"] if user.disabled else []), sep="\t")
    if not users:
        print("There are no users: `cxrbatch review add-user NAME` makes one.")


def _ask_password() -> str:
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\n")
    else:
        try:
            password, again = getpass.getpass("Password: "), getpass.getpass("Again: ")
        except EOFError:  # Ctrl-D
            raise Fatal("There was no password: nothing was changed.") from None
        if again != password:
            raise Fatal("The two passwords differ: nothing was changed.")
    check_new_password(password)
    return password
