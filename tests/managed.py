"""A Postgres as a provider runs it: TLS by a private authority, roles that may little, a pooler in front of it."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from polytower.cluster import USER, Cluster
from polytower.url import parts

# An ordinary password, and what a generator of a provider would make.
PASSWORD = "o'r d@in/ary%7"
_OPENSSL = """
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.crt -subj /CN=authority
openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost
printf 'subjectAltName=DNS:localhost' > names
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out server.crt -extfile names
"""


@dataclass(frozen=True)
class Managed:
    """root: the provider's own URL."""

    root: str

    def at(self, database: str) -> str:
        """The provider's own connection to a customer's database."""
        return make_conninfo(self.root, dbname=database)

    @contextmanager
    def customer(self, name: str, *statements: str) -> Iterator[str]:
        """URL of a role without any privilege, in a database of its own after the provider ran these statements."""
        role = f"{name}_customer"
        names = {"role": sql.Identifier(role), "name": sql.Identifier(name), "password": sql.Literal(PASSWORD)}
        with psycopg.connect(self.root, autocommit=True) as root:
            root.execute(sql.SQL("create role {role} login password {password}").format(**names))
            root.execute(sql.SQL("create database {name}").format(**names))
        try:
            with psycopg.connect(self.at(name), autocommit=True) as admin:
                for statement in statements:
                    admin.execute(sql.SQL(statement).format(**names))
            port = parts(self.root)["port"]
            yield f"postgresql://{role}:{quote(PASSWORD, safe='')}@localhost:{port}/{name}"
        finally:
            with psycopg.connect(self.root, autocommit=True) as root:
                root.execute(sql.SQL("drop database {name} with (force)").format(**names))
                root.execute(sql.SQL("drop role {role}").format(**names))


@contextmanager
def managed_server() -> Iterator[Managed]:
    """Starts it in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="polytower-managed-"))
    cluster = Cluster(folder / "postgres")
    try:
        cluster.ensure_made()
        cluster.start()
        password = quote(cluster.password_file.read_text(), safe="")
        yield Managed(f"postgresql://postgres:{password}@localhost:{cluster.port_file.read_text()}/postgres")
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def authority(folder: Path) -> Path:
    """The certificate of a private authority; beside it lie server.crt and server.key for localhost."""
    subprocess.run(["sh", "-ec", _OPENSSL], cwd=folder, check=True, capture_output=True)
    return folder / "ca.crt"


@contextmanager
def pgbouncer(url: str, mode: str, certificates: Path | None = None) -> Iterator[str]:
    """The URL through a PgBouncer of this pool mode; given certificates (a folder), it takes TLS alone."""
    given = parts(url)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="polytower-pgbouncer-"))
    user, password = (given[name].replace('"', '""') for name in ("user", "password"))
    (folder / "users.txt").write_text(f'"{user}" "{password}"\n')
    tls = ""
    if certificates is not None:
        for name in ("server.crt", "server.key"):
            shutil.copy(certificates / name, folder / name)
        tls = f"client_tls_sslmode = require\nclient_tls_cert_file = {folder}/server.crt\n"
        tls += f"client_tls_key_file = {folder}/server.key\n"
    (folder / "pgbouncer.ini").write_text(
        f"""[databases]
{given["dbname"]} = host=127.0.0.1 port={given["port"]}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users.txt
pool_mode = {mode}
default_pool_size = 10
{tls}"""
    )
    command = ["pgbouncer", "-q", str(folder / "pgbouncer.ini")]
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, USER)
        command[1:1] = ["-u", USER]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield url.replace(f"localhost:{given['port']}", f"localhost:{port}")
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
