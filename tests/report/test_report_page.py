"""The page: what it says, that it is whole, that it asks nobody for anything, and that names stay text."""

import re
from html.parser import HTMLParser

import pytest

from fvae_lora_experiments.report import write_page
from synthetic_runs import metrics, record, write_many, write_run

VOID = {"meta", "link", "br"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{7*7}}</title></style>"


class Page(HTMLParser):
    """A page as elements and text; fails where elements are not closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self.text += " "

    def handle_data(self, data):
        self.text += data if self._open and self._open[-1] != "style" else ""

    def count(self, tag, css=None):
        return sum(t == tag and (css is None or css in (a.get("class") or "").split()) for t, a in self.elements)


@pytest.fixture(scope="module")
def source(demo, tmp_path_factory):
    return write_page([demo], tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def words(page):
    return " ".join(page.text.split())


def test_it_says_how_many_runs_it_shows_and_which_it_does_not(page):
    text = words(page)
    assert "10 of 13 runs counted 1 failed 1 running 1 unreadable 2 rows with seeds missing" in text
    assert "full-42 failed the loss is NaN at step 310" in text
    assert "linear-probe-42 running not finished" in text
    assert "cut-off unreadable run.json: Invalid JSON" in text


def test_it_says_what_was_measured(page):
    text = words(page)
    assert "Task image, protocol clean." in text
    for fact in ("train 1078, validation 359, test 360", "tiny-vit, SHA-256 0123456789ab", "device cpu, threads 2"):
        assert fact in text


def test_its_numbers_are_the_table_s(tmp_path):
    for seed, accuracy in ((1, 0.90), (2, 0.92), (42, 0.97)):
        run = record("lora", seed)
        run["metrics"]["test"]["accuracy"] = accuracy
        write_run(tmp_path / "runs" / str(seed), run)
    page = Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "lora 93.00 ± 3.61 8.96 3 Test accuracy, higher is better" in words(page)
    assert "lora 0.001 295k 295k" in words(page)


def test_charts_show_every_method_and_every_seed(page):
    assert page.count("figure") == 6
    assert page.count("path", "seed") == 2 * 10  # two charts, ten finished runs
    assert page.count("svg", "strip") == 4
    assert page.count("circle") == 10
    assert page.count("svg", "spark") == 12 * 4  # adapted layers, terms


def test_layers_show_first_and_last_value_of_each_term(tmp_path):
    lines = [
        {"event": "train", "epoch": e, "loss": 1.0, "elbo": {"m.0.q": {"gamma": g}, "m.1.q": {"gamma": -g, "w2": 1}}}
        for e, g in ((1, -18.0), (2, -3.0), (3, 4.5))
    ]
    write_run(tmp_path / "runs" / "a", record("fvae-lora"), lines)
    text = words(Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8")))
    assert "layer gamma w2 0.q −18 → 4.5 1.q 18 → −4.5 1 → 1" in text


def test_every_coordinate_is_a_number(page):
    shapes = [a for tag, a in page.elements if tag in ("path", "circle", "text")]
    geometry = [a[name] for a in shapes for name in ("d", "x", "y", "cx", "transform") if name in a]
    assert len(geometry) > 200
    assert all(re.fullmatch(r"[-\d. MHVahvz]+|translate\([-\d. ]+\)", value) for value in geometry)


def test_it_requests_nothing(page, source):
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert attributes.get(name, "#").startswith("#") or attributes[name] == "data:,"
    assert "http:" not in source
    assert "https:" not in source
    assert not re.search(r"url\(|@import|@font-face", source)
    assert page.count("script") == 0
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_links_lead_somewhere_and_ids_are_unique(tmp_path):
    for dataset in ("a", "b"):
        write_run(tmp_path / "runs" / dataset, record(dataset=dataset))
    write_run(tmp_path / "runs" / "odd", "")
    page = Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    links = [a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")]
    assert len(ids) == len(set(ids))
    assert len(links) == 3
    assert set(links) <= set(ids)


def test_scrolling_parts_take_the_keyboard_and_charts_have_names(page):
    scrolling = [a for t, a in page.elements if t == "div" and a.get("class") == "scroll"]
    assert scrolling
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    svgs = [a for t, a in page.elements if t == "svg"]
    assert all(a.get("aria-hidden") == "true" or (a["role"] == "img" and a["aria-label"]) for a in svgs)


def test_names_stay_text(tmp_path):
    run = record(HOSTILE, dataset=HOSTILE, model={"name": HOSTILE, "fingerprint": HOSTILE})
    run |= {"task": HOSTILE, "git_commit": HOSTILE, "hardware": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    run["dataset"] |= {"protocol": HOSTILE, "splits": {HOSTILE: HOSTILE}, "validation_from": HOSTILE}
    lines = metrics("lora", epochs=2)
    lines.append({"event": "train", "epoch": 2, "elbo": {f"a.{HOSTILE}": {HOSTILE: 1.0}, "a.b": {HOSTILE: 2.0}}})
    other = run | {"recipe": {"train": {HOSTILE: HOSTILE}}}
    failed = run | {"state": "failed", "reason": HOSTILE, "seed": 2}
    folder = tmp_path / "runs" / HOSTILE.replace("/", "")
    for name, content in (("a", run), ("b", other), ("c", failed), ("d", run | {"state": HOSTILE})):
        write_run(folder / name, content, lines)
    plain = tmp_path / "plain"
    for name, content in (("a", record()), ("b", record(recipe={"train": {"x": "y"}}))):
        write_run(plain / name, content)

    page = Page(write_page([folder], tmp_path / "page.html").read_text(encoding="utf-8"))

    assert page.count("script") == page.count("img") == 0
    assert page.count("title") > 1
    assert page.count("style") == 1
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 12
    assert "{{7*7}}" in page.text
    expected = {tag for tag, _ in Page(write_page([plain], tmp_path / "plain.html").read_text()).elements}
    assert {tag for tag, _ in page.elements} <= expected | {"details", "summary", "path", "circle", "a", "span"}


def test_names_that_no_file_can_hold(tmp_path):
    write_run(tmp_path / "runs" / "a", record(dataset="\x00\x1b[2J\n"), [
        {"event": "train", "epoch": 1, "elbo": {"\ud800": {"\udfff": 1.0}}},
    ])  # fmt: skip
    assert "\x1b" not in write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_finished_is_a_page_too(tmp_path):
    write_run(tmp_path / "runs" / "a", record(state="failed", reason="disk full", metrics=None))
    page = Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "0 of 1 run counted 1 failed" in words(page)
    assert page.count("figure") == 0


def test_a_record_without_costs_or_curves_is_a_row(tmp_path):
    write_run(tmp_path / "runs" / "a", record(parameters=None, time=None, memory=None, flops=None, recipe=None))
    page = Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.count("figure") == 0
    assert re.search(r"lora \d+\.\d\d – 1 .* lora – – – – – – –", words(page))


def test_a_seed_without_curves_does_not_hide_the_others(tmp_path):
    for seed in (1, 2, 3):
        lines = metrics("fvae-lora", seed, epochs=2, layers=1) if seed < 3 else []
        write_run(tmp_path / "runs" / str(seed), record("fvae-lora", seed), lines)
    page = Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.count("path", "seed") == 2 * 2
    assert page.count("svg", "spark") == 2 * 4


def test_the_same_runs_give_the_same_page(demo, tmp_path, source):
    assert write_page([demo], tmp_path / "page.html").read_text(encoding="utf-8") == source


def test_many_rows_share_charts_of_at_most_eight(tmp_path):
    for rate in range(1, 21):
        run = record("lora")
        run["recipe"]["train"]["learning_rate"] = rate / 1000
        write_run(tmp_path / "runs" / str(rate), run, metrics("lora", epochs=3))
    page = Page(write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.count("figure") == 3 * 2 + 4
    assert page.count("svg", "swatch") == 20 + 20 + 20


@pytest.mark.slow
def test_the_whole_benchmark_stays_a_page(tmp_path):
    for dataset in "abcdef":
        for number in range(16):
            for seed in (1, 2):
                run = record(f"method-{number}", seed, dataset)
                lines = metrics("fvae-lora" if number < 6 else "lora", seed, dataset, epochs=3)
                write_run(tmp_path / "runs" / f"{dataset}-{number}-{seed}", run, lines)
    out = write_page([tmp_path / "runs"], tmp_path / "page.html")
    assert out.stat().st_size < 4e6
    page = Page(out.read_text(encoding="utf-8"))
    assert page.count("section") == 7  # the overview and six data sets
    assert page.count("svg", "strip") == 6 * 16
    assert not any("open" in attributes for tag, attributes in page.elements if tag == "details")


def test_200_runs_stay_a_page(tmp_path):
    write_many(tmp_path / "runs")
    out = write_page([tmp_path / "runs"], tmp_path / "page.html")
    assert out.stat().st_size < 3e6
    page = Page(out.read_text(encoding="utf-8"))
    assert "200 of 200 runs counted" in words(page)
    assert page.count("section") == 6  # the overview and five data sets
