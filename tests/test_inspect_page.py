"""The HTML page of adaptlora inspect, in a browser: drawn, sorted, walked by keys, and unable to load or run what it must not."""

import json

import browser as browsers
import pytest
from adapter_folders import factors, stack, write

from adaptlora.inspection import compare, inspect_adapter, page_data, save_page

KINDS = ("mlp.up_proj", "self_attn.q_proj")
COLUMN = "[...document.querySelectorAll('.modules tbody tr')].map((row) => row.cells[{}].textContent)"
FOCUSED = "document.activeElement.getAttribute('aria-label')"
SCRIPT = "<script>window.hacked=1</script>"
NASTY = (
    f"h.0.{SCRIPT}",
    'h.1."><img src=x onerror=window.hacked=2>',
    "h.2.&lt;b&gt;\u2028--><!--<script>",
    "h.3.</script </title></table>${1}$title\\",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if browsers.find() is None:
        pytest.skip("needs a browser, and chromium is not installed")
    with browsers.Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def shown(browser, path, **options):
    """Open a page, which must be drawn without an error and without a request for anything else."""
    url = path.resolve().as_uri()
    browser.open(url, **options)
    assert_whole(browser)
    assert browser.requests == [url]


def assert_whole(browser):
    assert browser.run("({...document.documentElement.dataset})") == {"ready": ""} and browser.said == []


@pytest.fixture
def one(tmp_path):
    """(page of an adapter of 3 layers with ranks over 500 steps, its ranks by module)"""
    modules = stack(3, [4, 1, 3, 2], KINDS)
    ranks = {name: len(lora_A) for name, (lora_A, _) in modules.items()}
    changes = [[step, step % 6, 1 + step % 3] for step in range(1, 500)]
    changes += [[500, i, rank] for i, rank in enumerate(ranks.values())]
    history = {"groups": {name: [name] for name in ranks}, "start": [1] * 6, "changes": changes, "steps": 500}
    return save_page(inspect_adapter(write(tmp_path / "one", modules, history)), tmp_path / "one.html", ["one"]), ranks


def test_page_of_one_adapter_is_drawn_sorts_and_filters(browser, one):
    path, ranks = one
    shown(browser, path)
    assert browser.run("document.title") == "Adapter: one"
    assert browser.texts(".heat thead th") == ["layer", "0", "1", "2"]
    cells = [str(ranks[f"model.layers.{layer}.{kind}"]) for kind in KINDS for layer in range(3)]
    assert browser.texts(".heat td") == cells and len(browser.texts(".modules tbody tr")) == 6
    for wanted, reverse in (("descending", True), ("ascending", False)):
        browser.click(".modules thead th:nth-child(3) button")
        assert browser.run(COLUMN.format(2)) == [str(rank) for rank in sorted(ranks.values(), reverse=reverse)]
        assert browser.run("document.querySelector('.modules thead th:nth-child(3)').ariaSort") == wanted
    assert browser.run("location.hash") == "#sort=rank:asc&module=0"
    browser.open(f"{path.as_uri()}#sort=parameters:desc&module=3")
    assert browser.run(COLUMN.format(3)) == [str(21 * rank) for rank in sorted(ranks.values(), reverse=True)]
    assert browser.run("document.getElementById('module').selectedIndex") == 3
    browser.run("document.getElementById('filter').value = 'LAYERS.1'")
    browser.run("document.getElementById('filter').dispatchEvent(new Event('input'))")
    assert len(browser.run(COLUMN.format(0))) == 2 and "2 of 6 modules" in browser.texts(".modules caption")[0]
    assert_whole(browser)


def test_keys_walk_through_cells_values_and_steps(browser, one):
    path, ranks = one
    shown(browser, path)
    browser.run("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
    browser.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight")  # there is no fourth layer
    name, rank = "model.layers.2.self_attn.q_proj", ranks["model.layers.2.self_attn.q_proj"]
    assert browser.run(FOCUSED) == f"self_attn.q_proj, layer 2: {rank}"
    assert browser.texts(".heat td[tabindex='0']") == [str(rank)]
    assert browser.texts("figure > .readout")[0].startswith(f"{name}: rank {rank}, ‖ΔW‖ ")
    browser.press("Enter")
    assert browser.run("document.getElementById('module').selectedOptions[0].value") == name
    assert browser.run("document.querySelector('.modules tr[aria-current]').textContent").startswith(
        "2.self_attn.q_proj"
    )
    norms = inspect_adapter(path.parent / "one").modules[5].norms
    browser.run("document.querySelector('.charts svg').focus()")
    browser.press("End")
    assert browser.texts(".charts .readout")[0] == f"vector 4: {'–' if rank < 4 else format(norms[3], '.3g')}"
    browser.press("Home")
    assert browser.texts(".charts .readout")[0] == f"vector 1: {norms[0]:.3g}"
    browser.run("document.querySelector('.steps svg').focus()")
    browser.press("End", "ArrowDown")
    second = list(ranks)[1]
    assert browser.texts(".steps .readout") == [f"step 500, {second}: rank {ranks[second]}; sum {sum(ranks.values())}"]
    assert_whole(browser)
    # whoever cannot see the pictures has their titles, their values as tables, and a name for each control
    assert browser.run(
        "[...document.querySelectorAll('svg')].every((svg) => svg.ariaLabel && svg.querySelector('title'))"
    )
    assert browser.run("[...document.querySelectorAll('input, select')].every((node) => node.labels.length === 1)")
    assert browser.run("document.querySelectorAll('figure details table, figure table.heat').length") == 4


def test_two_adapters_side_by_side_on_a_phone_in_the_dark(browser, tmp_path):
    before = stack(2, [4, 3], KINDS)
    after = {name: (A[:2], B[:, :2]) for name, (A, B) in list(before.items())[:3]} | {"model.layers.1.new": factors(1)}
    sides = [
        inspect_adapter(write(tmp_path / name, modules)) for name, modules in (("before", before), ("after", after))
    ]
    path = save_page(compare(*sides), tmp_path / "two.html", ["before", "after"])
    shown(browser, path, width=360, dark=True)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    titles = ["Ranks of before", "Ranks of after", "Difference of ranks: after − before"]
    assert browser.texts("figure:has(.heat) figcaption") == [*titles, "Overlap of the column spaces of ΔW, in %"]
    rows = [
        browser.run(f"[...document.querySelectorAll('.heat')[{i}].rows].slice(1).map((row) => row.innerText)")
        for i in range(4)
    ]
    assert [[row.split("\t")[1:] for row in of] for of in rows] == [
        [["4", "4"], ["3", "3"], ["", ""]],
        [["2", "2"], ["2", ""], ["", "1"]],
        [["−2", "−2"], ["−1", ""], ["", ""]],
        [["100", "100"], ["100", ""], ["", ""]],
    ]
    assert browser.texts(".charts figcaption")[2] == "Principal angles between the two ΔW"
    assert browser.texts(".lists h3") == ["Modules in before only", "Modules in after only"]
    assert browser.texts(".lists li") == ["model.layers.1.self_attn.q_proj", "model.layers.1.new"]
    shown(browser, path)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_names_are_text_whatever_they_hold(browser, tmp_path):
    found = inspect_adapter(write(tmp_path / "x", {name: factors(2) for name in NASTY}))
    assert list(found.ranks()) == list(NASTY)
    path = save_page(found, tmp_path / "x.html", [f'a"{SCRIPT}'])
    shown(browser, path)
    assert browser.run("window.hacked === undefined && document.images.length === 0 && document.scripts.length === 2")
    assert browser.texts("option") == list(NASTY) and browser.run(COLUMN.format(0)) == [n[2:] for n in NASTY]
    assert browser.texts("h1") == [f'Adapter: a"{SCRIPT}']


def test_a_page_that_was_tampered_with_neither_runs_nor_loads_and_says_so(browser, one):
    """Twice safe: markup that got in all the same is stopped by the page's own policy."""
    path, _ = one
    text = path.read_text()
    for added in (
        SCRIPT,
        '<img src="http://127.0.0.1:9/x.png">',
        '<p onclick="1">',
        '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">',
    ):
        path.write_text(text.replace("</main>", f"</main>{added}"))
        browser.open(path.as_uri())
        assert "Content Security Policy" in "".join(browser.said), added
        assert browser.run("window.hacked") is None
    path.write_text(text.replace('"kinds"', '"kind"'))
    browser.open(path.as_uri())
    assert "could not be drawn" in browser.texts("#problem")[0] and browser.run(
        "document.documentElement.dataset.error"
    )


def test_more_ranks_and_norms_than_a_call_has_room_for(browser, tmp_path):
    """560 modules as LLaMA-3 70B has them: of rank 256, over more steps than the page has columns for."""
    modules = stack(80, [256], [f"part.{kind}" for kind in "abcdefg"], K=1, N=1)
    history = {"groups": {name: [name] for name in modules}, "start": [256] * 560, "changes": [], "steps": 500}
    found = inspect_adapter(write(tmp_path / "x", modules, history))
    shown(browser, save_page(found, tmp_path / "x.html"))
    assert len(browser.texts(".modules tbody tr")) == 560 and len(browser.texts(".charts .context")) == 2 * 559
    browser.run("document.querySelector('.steps svg').focus()")
    assert browser.texts(".steps .readout") == [f"step 0, {next(iter(modules))}: rank 256; sum 143,360"]


def test_size_of_two_adapters_of_210_modules(tmp_path):
    kinds = [f"self_attn.{kind}" for kind in ("q_proj", "k_proj", "v_proj", "o_proj")]
    kinds += [f"mlp.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")]
    first, second = (
        inspect_adapter(write(tmp_path / str(seed), stack(30, [16, 12], kinds, seed, K=32, N=24))) for seed in (0, 1000)
    )
    result = compare(first, second)
    path = save_page(result, tmp_path / "page.html")
    assert 100_000 < path.stat().st_size < 2_000_000
    text = path.read_text()
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "") and "https:" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    labels = [str(tmp_path / "0"), str(tmp_path / "1000")]
    assert data == json.loads(json.dumps(page_data(result, labels))) and len(data["modules"]) == 210
    with pytest.raises(ValueError, match=r"page: labels must be 2, got \['a'\]"):
        save_page(result, path, ["a"])
    assert path.read_text() == text
