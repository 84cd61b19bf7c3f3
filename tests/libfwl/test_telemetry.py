"""No session looks for a server: ONNX Runtime's uploader is off in libfwl and in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Seconds after which an ONNX Runtime that is allowed to report has looked for its server; 1.32.0
# does so after 7.
PATIENCE = 40

# Notes each name that a process looks up, and each connection that it opens.
_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what) {
  const int file = open(getenv("LOOKUPS"), O_WRONLY | O_APPEND | O_CREAT, 0666);
  if (write(file, what, strlen(what)) < 0 || write(file, "\n", 1) < 0) abort();
  close(file);
}
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
  note(name ? name : "(no name)");
  return EAI_FAIL;
}
struct hostent *gethostbyname(const char *name) {
  note(name);
  return 0;
}
int connect(int socket, const struct sockaddr *address, socklen_t size) {
  if (address->sa_family != AF_UNIX) note("connect");
  int (*next)(int, const struct sockaddr *, socklen_t);
  *(void **)&next = dlsym(RTLD_NEXT, "connect");
  return next(socket, address, size);
}
"""

_LIBFWL = """
import sys
from pathlib import Path
from tests.libfwl.library import Library

bundle, library, runtime = map(Path, sys.argv[1:])
session = Library(library).open(bundle, runtime).session()
session.feed([[1, 2]])
print("ready", flush=True)
sys.stdin.read()
"""

_PYTHON = """
import sys
from fwl_export import open_session

open_session(sys.argv[1]).feed([1, 2])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("cc is not installed")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(_SHIM)
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True
    )
    return library


class Watched:
    """A process with a session, a home folder of its own and a list of what it looks up."""

    def __init__(self, shim: Path, home: Path, code: str, *arguments: object, allowed: str) -> None:
        home.mkdir()
        self.home, self.lookups = home, home / "lookups"
        given = {"ORT_DISABLE_TELEMETRY": allowed} if allowed else {}
        kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={
                **kept,
                **given,
                "HOME": str(home),
                "LD_PRELOAD": str(shim),
                "LOOKUPS": str(self.lookups),
            },
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def found(self) -> list[str]:
        """What was looked up, and the files that were left in the home folder."""
        names = self.lookups.read_text().split("\n") if self.lookups.exists() else []
        return names + [str(path) for path in self.home.rglob("*onnxruntime*")]

    def close(self) -> None:
        self.process.communicate()


def test_sessions_do_not_call_home(
    shim: Path, tmp_path: Path, libfwl: Path, runtime: Path, tiny_bundle: Path
) -> None:
    arguments = (tiny_bundle, libfwl / "libfwl.so", runtime)
    quiet = [
        Watched(shim, tmp_path / "libfwl", _LIBFWL, *arguments, allowed=""),
        Watched(shim, tmp_path / "python", _PYTHON, tiny_bundle, allowed=""),
    ]
    # Opened last, so that the others have had more time when this one looks for its server.
    loud = Watched(shim, tmp_path / "allowed", _LIBFWL, *arguments, allowed="0")
    deadline = time.monotonic() + PATIENCE
    while not loud.lookups.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    reported = loud.found()
    for each in (*quiet, loud):
        each.close()
    assert [each.found() for each in quiet] == [[], []]
    if not reported:
        pytest.skip("this ONNX Runtime does not report even if it may")
    assert any("microsoft" in name for name in reported)
