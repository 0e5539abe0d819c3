"""The page at `/`, over HTTP: its files, its headers, and no other file. In a browser: test_browser.py."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.deployments.processes import until
from tests.deployments.service import ROOT, Service

PAGE = ROOT / "deployments" / "page"


def test_its_files_come_as_they_are(http: httpx.Client) -> None:
    for path, name, kind in (
        ("/", "index.html", "html"),
        ("/page/page.css", "page.css", "css"),
        ("/page/page.js", "page.js", "javascript"),
    ):
        answer = http.get(path)
        assert answer.status_code == 200 and answer.text == (PAGE / name).read_text()
        assert kind in answer.headers["Content-Type"] and answer.headers["X-Content-Type-Options"] == "nosniff"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_it_loads_nothing_from_elsewhere_and_has_no_code_of_its_own() -> None:
    content = (PAGE / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"#]*)"', content)) == {
        "page/page.css",
        "page/page.js",
        "data:,",
        "docs",
    }
    assert not re.search(r"<script(?![^>]* src=)|<style| on\w+=| style=", content)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", (PAGE / "page.js").read_text()
    )


@pytest.mark.parametrize(
    "path",
    [
        "/page/", "/page/index.html", "/page/../ingress.py", "/page/..%2fingress.py", "/page/%2e%2e/ingress.py",
        "/page/....//ingress.py", "/page//etc/passwd", "/page/page.js/..", "/page/page.js%00.css", "/page/PAGE.JS", "/page.js",
        "/../page/page.js%2f..%2f..%2fingress.py",
    ],
)  # fmt: skip
def test_no_other_file(service: Service, path: str) -> None:
    with service.client() as http:
        answer = http.get(httpx.URL(service.url).copy_with(raw_path=path.encode()))
    assert answer.status_code in (400, 404), answer.text
    assert "import" not in answer.text


def test_the_live_view(service: Service, http: httpx.Client, files: list[bytes]) -> None:
    uploads = [("files", (f"{number}.png", data)) for number, data in enumerate(files)]
    replicas = {"Ingress": 1, "ImageDecoder": 1, "ImageEncoder": 1, "TextEncoder": 1}
    until(lambda: http.get("/v1/stats").json()["replicas"] == replicas, 30, "the controller's answer")
    for number in range(2):
        http.post("/v1/embeddings/images", files=uploads)
        http.post("/v1/embeddings", json={"input": f"a text that is not remembered {number}"})
    now = http.get("/v1/stats").json()
    assert list(now) == ["model", "search", "items_per_second", "in_flight", "batch", "replicas"]
    assert now["model"] == http.get("/v1/models/tiny").json() and now["search"] is False
    assert now["items_per_second"]["image"] >= 2.4 and now["items_per_second"]["text"] > 0
    assert 1 <= now["batch"]["image"] <= 32 and now["batch"]["text"] >= 1
    assert now["in_flight"] == {"image": 0, "text": 0}
    assert now["replicas"] == replicas
