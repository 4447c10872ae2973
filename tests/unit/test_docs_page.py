"""The pages for people: complete, harmless, and readable by everybody.

Source: WCAG 2.2; CSP Level 3 §2.3.1 (hash sources).
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import yaml

from coatcheck import apikey
from coatcheck.server import pages
from coatcheck.server.pages import prose

TOP = Path(__file__).parents[2]
DEFAULT_ISSUER = "http://127.0.0.1:8000"
ISSUER = "https://tokens.example.org/coat"
# The loader and the dumper in C take a tenth of the time.
DOCUMENT: dict[str, Any] = yaml.load(pages.openapi_text(), Loader=yaml.CSafeLoader)

#: Elements without an end tag.
VOID = {"meta", "br", "hr", "link", "img", "input", "base", "source"}
#: Whatever makes a browser fetch or run something.
LOADING_ELEMENTS = {
    "script", "link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form"
}  # fmt: skip
LOADING_ATTRIBUTES = {"src", "srcset", "data", "poster", "background", "action", "style"}


class Reading(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.blocks: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag == "pre":
            self.blocks.append("")
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles[-1] += data
            return
        self.text += data
        if any(re.fullmatch(r"h[1-6]", tag) for tag in self.open):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        if "pre" in self.open:
            self.blocks[-1] += data

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]


def docs(issuer: str = ISSUER, document: dict[str, Any] = DOCUMENT) -> Reading:
    text = yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False)
    return Reading(pages.render_docs(text, issuer))


DOCS = docs()
PAGES = {"docs": DOCS, "authorize": Reading(pages.authorize_page(ISSUER))}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def squeezed(text: str) -> str:
    """Text as it is read: a run of blanks is one blank, and markup is not seen."""
    return " ".join(re.sub(r"`|\*\*|^- ", " ", text, flags=re.MULTILINE).split())


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def with_issuer(value: Any) -> Any:
    """The same value as the page of another issuer has to show it."""
    return json.loads(json.dumps(value).replace(DEFAULT_ISSUER, ISSUER))


def examples(node: Any = DOCUMENT) -> Iterator[dict[str, Any]]:
    """Every example that holds a value; what only refers to one is met where that one stands."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "examples" and isinstance(value, dict):
                yield from (example for example in value.values() if "value" in example)
            else:
                yield from examples(value)


def shown(block: str) -> Iterator[Any]:
    """Every value that a block of the page can be read as."""
    yield block
    body = block.partition("\n\n")[2]
    yield dict(parse_qsl(body))
    if body[:1] == "{":
        yield json.loads(body)
    yield block.partition(": ")[2]
    if block[:1] in "{[":
        yield json.loads(block)
    if block.startswith("openapi: "):
        yield yaml.safe_load(block)


def test_every_operation_is_on_the_page() -> None:
    """What is not on the page does not exist for its reader."""
    headings = {text.strip() for _, text in DOCS.headings}
    text = squeezed(DOCS.text)
    for line, operation in operations():
        assert line in headings
        assert operation["operationId"] in DOCS.values("id")
        assert squeezed(operation["summary"]) in text
        for sentence in operation["description"].splitlines():
            assert without_blanks(sentence) in without_blanks(DOCS.text)


def without_blanks(text: str) -> str:
    return "".join(squeezed(text).split())


def test_every_status_of_every_operation_is_on_the_page() -> None:
    anchors = set(DOCS.values("id"))
    for _, operation in operations():
        for status in operation["responses"]:
            assert f"{operation['operationId']}-{status}" in anchors


def test_every_form_field_is_on_the_page() -> None:
    terms = re.findall(r"<dt><code>([^<]+)</code>", DOCS.html)
    for name in ("TokenRequest", "IntrospectionRequest", "RevocationRequest", "NewApiKey"):
        assert set(DOCUMENT["components"]["schemas"][name]["properties"]) <= set(terms)


def test_every_parameter_is_on_the_page() -> None:
    """Those that many operations share as well."""
    terms = set(re.findall(r"<dt><code>([^<]+)</code>", DOCS.html))
    for _, operation in operations():
        for parameter in operation.get("parameters", ()):
            shared = DOCUMENT["components"]["parameters"]
            node = shared[parameter["$ref"].split("/")[-1]] if "$ref" in parameter else parameter
            assert node["name"] in terms


def test_an_answer_that_many_operations_share_is_described_once() -> None:
    """Sixty descriptions of one refusal would bury what is special about an operation."""
    text = squeezed(DOCUMENT["components"]["responses"]["NotJson"]["description"])

    assert squeezed(DOCS.text).count(text) == 1
    assert DOCS.values("href").count("#answer-NotJson") > 10


def test_every_example_is_on_the_page() -> None:
    """People copy from examples; each is shown whole, whatever its media type."""
    values = [value for block in DOCS.blocks for value in shown(block)]
    found = list(examples())

    assert len(found) > 40
    for example in found:
        value = with_issuer(example["value"])
        assert (value.rstrip("\n") if isinstance(value, str) else value) in values, example
        assert squeezed(example["summary"]) in squeezed(DOCS.text)


def test_every_header_and_every_error_code_is_on_the_page() -> None:
    for header in DOCUMENT["components"]["headers"].values():
        assert with_issuer(str(header["example"])) in DOCS.text
    text = without_blanks(DOCS.text)
    for name in ("ErrorCode", "ProblemCode"):
        meanings = DOCUMENT["components"]["schemas"][name]["x-enumDescriptions"]
        for code, meaning in meanings.items():
            assert code in DOCS.text
            assert without_blanks(meaning) in text


def test_no_markup_of_the_descriptions_is_left_over() -> None:
    """The little markup of `prose` is all that the contract uses."""
    prose_only = DOCS.text
    for block in DOCS.blocks:
        prose_only = prose_only.replace(block, "")
    assert re.findall(r"`|\*\*|\]\(|^#|^- ", prose_only, flags=re.MULTILINE) == []


def test_a_page_speaks_of_the_configured_issuer() -> None:
    """A command that is copied from the page has to reach this server and no other."""
    assert DEFAULT_ISSUER not in DOCS.html
    assert f"{ISSUER}/oauth/token" in DOCS.blocks[0]
    assert f"{ISSUER}/oauth/token" in PAGES["authorize"].text
    assert f"{ISSUER}/docs" in PAGES["authorize"].values("href")


def test_the_quick_start_is_five_lines_that_a_shell_takes() -> None:
    lines = DOCS.blocks[0].splitlines()

    assert len(lines) == 5
    assert sum("curl" in line for line in lines) == 4
    for line in lines:
        assert "#" not in line, "an interactive zsh runs comments"
        subprocess.run(["bash", "-n", "-c", line], check=True)


@pytest.mark.parametrize("blank", ["", " "], ids=["compact", "spaced"])
def test_the_quick_start_picks_the_token_out_of_an_answer(blank: str) -> None:
    """The line runs as it stands, with a curl that answers from memory."""
    (line,) = (line for line in DOCS.blocks[0].splitlines() if line.startswith("TOKEN="))
    answer = f'{{"access_token":{blank}"a.b-c.d_e","token_type":{blank}"Bearer"}}'
    script = f"curl() {{ printf '%s' '{answer}'; }}\n{line}\nprintf '%s' \"$TOKEN\""

    ran = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)

    assert ran.stdout == "a.b-c.d_e"


def test_the_quick_start_holds_no_usable_api_key() -> None:
    example = DOCS.blocks[0].splitlines()[0].removeprefix("API_KEY=")

    assert apikey.looks_like_one(example)
    with pytest.raises(apikey.MalformedApiKey):
        apikey.parse(example)


HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


def poisoned(node: Any) -> Any:
    """The document with hostile text in everything that a person writes."""
    if isinstance(node, list):
        return [poisoned(value) for value in node]
    if isinstance(node, dict):
        return {
            name: value + HOSTILE
            if name in {"title", "version", "summary", "description"} and isinstance(value, str)
            else poisoned(value)
            for name, value in node.items()
        }
    return node


def test_nothing_in_the_document_can_bring_its_own_markup() -> None:
    page = docs(document=poisoned(DOCUMENT))

    assert "script" not in page.tags
    assert "{{ 7 * 7 }}" in page.text
    assert page.text.count("<script>alert(1)</script>") > 40


@pytest.mark.parametrize("hostile", [f"https://a.example/{HOSTILE}", 'https://a.example/" x="'])
def test_nothing_in_the_issuer_can_bring_its_own_markup(hostile: str) -> None:
    for html in (
        pages.render_docs(pages.openapi_text(), hostile),
        pages.authorize_page(hostile),
    ):
        page = Reading(html)
        assert "script" not in page.tags
        assert page.values("x") == []
        assert hostile in "".join([page.text, *page.values("href")])


@every_page
def test_a_page_loads_nothing_and_runs_nothing(page: Reading) -> None:
    """A documentation page must not tell third parties who reads it."""
    attributes = {name for _, attrs in page.elements for name in attrs}

    assert not LOADING_ELEMENTS & set(page.tags)
    assert not LOADING_ATTRIBUTES & attributes
    assert not [name for name in attributes if name.startswith("on")]
    assert not re.findall(r"url\(|@import|image-set|http", "".join(page.styles))
    for link in page.values("href"):
        assert link.startswith(("#", ISSUER))


@every_page
def test_the_style_is_the_one_that_its_hash_allows(page: Reading) -> None:
    """CSP Level 3 §2.3.1: one byte of difference, and the browser shows a bare page."""
    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()

    assert f"sha256-{digest}" == pages.STYLE_HASH


@every_page
def test_headings_are_in_order(page: Reading) -> None:
    """WCAG 2.2 §1.3.1: one h1, and no level is skipped on the way down."""
    levels = [level for level, _ in page.headings]

    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(lower <= higher + 1 for higher, lower in pairwise(levels)), page.headings
    assert all(text.strip() for _, text in page.headings)


@every_page
def test_a_page_can_be_found_through_without_looking(page: Reading) -> None:
    """WCAG 2.2 §2.4.1 (skip link), §2.4.2 (title), §3.1.1 (language), §4.1.2 (names)."""
    html = dict(page.elements)
    first_link = next(attrs for tag, attrs in page.elements if tag == "a")

    assert html["html"]["lang"] == "en"
    assert page.tags.count("title") == 1
    assert first_link["href"] == "#content"
    assert html["main"]["id"] == "content"
    for landmark in ("header", "main", "footer"):
        assert page.tags.count(landmark) == 1
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if tag == "nav")


@every_page
def test_every_link_inside_a_page_leads_somewhere(page: Reading) -> None:
    anchors = page.values("id")
    pointers = page.values("aria-labelledby")
    inner = [link.removeprefix("#") for link in page.values("href") if link.startswith("#")]

    assert len(set(anchors)) == len(anchors)
    assert set(inner) <= set(anchors)
    assert set(pointers) <= set(anchors)


def test_what_scrolls_can_be_reached_by_keyboard() -> None:
    """WCAG 2.2 §2.1.1: a box that scrolls sideways has to take the focus."""
    boxes = [
        attrs
        for tag, attrs in DOCS.elements
        if tag == "pre" or "scroll" in (attrs.get("class") or "").split()
    ]
    tables = DOCS.tags.count("table")

    assert all(attrs.get("tabindex") == "0" for attrs in boxes)
    assert len(boxes) == len(DOCS.blocks) + tables
    assert tables > 0


COLORS = re.findall(r"--(\w+): #([0-9a-f]{6});", DOCS.styles[0])
SCHEMES = {"light": dict(COLORS[: len(COLORS) // 2]), "dark": dict(COLORS[len(COLORS) // 2 :])}


def luminance(color: str) -> float:
    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(color[at : at + 2], 16) / 255) for at in (0, 2, 4))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("ground", ["paper", "box"])
@pytest.mark.parametrize("ink", ["ink", "quiet", "link", "good", "bad"])
def test_text_stands_out(scheme: dict[str, str], ground: str, ink: str) -> None:
    """WCAG 2.2 §1.4.3: at least 4.5 to 1 for text of any size."""
    lighter, darker = sorted((luminance(scheme[ground]), luminance(scheme[ink])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_the_refusal_says_what_is_supported() -> None:
    page = PAGES["authorize"]

    assert "client_credentials" in page.text
    assert "400" in page.text


PROSE = {
    "paragraph": ("one\ntwo", "<p>one\ntwo</p>"),
    "paragraphs": ("one\n\ntwo\n", "<p>one</p>\n<p>two</p>"),
    "list": ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>"),
    "code": ("a `b <c>` d", "<p>a <code>b &lt;c&gt;</code> d</p>"),
    "strong": ("**a** & b", "<p><strong>a</strong> &amp; b</p>"),
    "code keeps stars": ("`**a**`", "<p><code>**a**</code></p>"),
    "no list": ("- a\nb", "<p>- a\nb</p>"),
    "lone mark": ("a ` b", "<p>a ` b</p>"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "html"), PROSE.values(), ids=PROSE)
def test_the_little_markup(text: str, html: str) -> None:
    assert str(prose.blocks(text)) == html


def test_a_checkout_serves_the_document_at_its_top() -> None:
    assert pages.openapi_text() == (TOP / "openapi.yaml").read_text("utf-8")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The pages as they lie in a site-packages directory, without a document yet."""
    target = tmp_path / "coatcheck"
    source = TOP / "app" / "coatcheck"
    shutil.copytree(source / "server" / "pages", target / "server" / "pages")
    for package in (".", "server"):
        shutil.copy(source / package / "__init__.py", target / package / "__init__.py")
    # What lies above the installation is none of ours.
    (tmp_path.parent / "openapi.yaml").write_text("of somebody else", "utf-8")
    return tmp_path


def read_document(installed: Path) -> subprocess.CompletedProcess[str]:
    code = "from coatcheck.server.pages import openapi_text; print(openapi_text(), end='')"
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )


def test_an_installation_serves_the_packaged_document(installed: Path) -> None:
    (installed / "coatcheck/server/pages/openapi.yaml").write_text("packaged", "utf-8")

    assert read_document(installed).stdout == "packaged"


def test_an_installation_without_the_document_says_so(installed: Path) -> None:
    """Refused at the start, and never with what happens to lie above it."""
    ran = read_document(installed)

    assert ran.returncode != 0
    assert "openapi.yaml is neither packaged" in ran.stderr
