"""The attention page: what it holds, and what a browser shows when somebody clicks."""

import base64
import json
import re
import zlib

import numpy as np
import pytest

import jaxheads as jh
from jaxheads.viz import attention_html
from tests.tiny import tiny_model
from tests.viz import chromium

L, H, T = 3, 4, 9
TOKENS = ["<s>", " Mary", " </script><script>document.title='x'</script>", "\n", " é", "", "&amp;",
          "{about}", "<!--"]  # fmt: skip


def attention(seed, shape=(L, H, T, T)):
    rng = np.random.default_rng(seed)
    weights = np.exp(3 * rng.normal(size=shape)) * np.tril(np.ones(shape[-2:]))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def about(page):
    return json.loads(re.search(r'id="about">(.*?)</script>', page, re.S)[1])


def stored(page, run, layer):
    """The numbers of a layer [H,T,S] as the page decodes them."""
    meta = about(page)
    text = re.search(rf'id="data-{run}-{layer}">(.*?)</script>', page, re.S)[1]
    codes = np.frombuffer(
        zlib.decompress(base64.b64decode(text)), "u1" if meta["bits"] == 8 else "<u2"
    )
    shape = (meta["heads"], meta["queries"], meta["keys"])
    return (codes.reshape(shape) / meta["scale"]) ** 2


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.004), (16, 1.6e-5), (None, 1.6e-5)])
def test_numbers_are_as_close_as_stated(bits, worst):
    first, second = attention(0), attention(1)
    page = attention_html(first, TOKENS, compare=second, bits=bits)
    scale = about(page)["scale"]
    for run, values in enumerate((first, second)):
        for layer in range(L):
            error = np.abs(stored(page, run, layer) - values[layer])
            assert np.all(error <= np.sqrt(values[layer]) / scale + 0.25 / scale**2 + 1e-7)
            assert error.max() <= worst
    assert np.all(stored(page, 0, 0)[:, np.triu(np.ones((T, T)), 1) == 1] == 0)


def test_large_patterns_take_eight_bits(monkeypatch):
    monkeypatch.setattr("jaxheads.viz.attention._FINE", L * H * T * T)
    assert about(attention_html(attention(0), TOKENS))["bits"] == 16
    assert about(attention_html(attention(0), TOKENS, compare=attention(1)))["bits"] == 8


def test_texts_stay_texts(tmp_path):
    """Whatever a token, a name or a title reads, the page has our scripts and no others."""
    evil = "</script><script>alert(1)</script><!--{script}"
    page = attention_html(
        attention(0), TOKENS, tmp_path / "a.html", title=evil, compare=attention(1),
        names=(evil, "&lt;"),
    )  # fmt: skip
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page
    assert page.count("<script") == page.count("</script>") == 2 + 2 * L
    assert "alert(1)</script>" not in page and "<!--" not in page.replace("<!doctype", "")
    meta = about(page)
    assert meta["runs"][0]["queries"] == TOKENS and meta["runs"][0]["name"] == evil
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)


def test_thumbnails_keep_the_largest_of_a_region():
    values = np.zeros((1, 1, 100, 100), np.float32)
    values[0, 0, 57, 33] = 1
    meta = about(attention_html(values, ["x"] * 100))
    small = np.frombuffer(base64.b64decode(meta["runs"][0]["thumbs"]), "u1")
    small = small.reshape(meta["thumb"], meta["thumb"])
    assert small.shape == (32, 32) and small.sum() == 255
    assert small[57 * 32 // 100, 33 * 32 // 100] == 255


def test_a_recorded_pattern_of_a_model():
    cfg = jh.ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=4, mlp_dim=16)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 7))
    seen = jh.record(jh.forward, "pattern")(tiny_model(cfg), tokens).seen["pattern"]
    page = attention_html(seen[:, 1], [str(t) for t in tokens[1]])
    np.testing.assert_allclose(stored(page, 0, 1), seen[1, 1], atol=2e-5)


BAD = {
    "a batch": (lambda a: (a[:, None], TOKENS), {}, r"pass pattern\[:, row\]"),
    "one layer": (lambda a: (a[0], TOKENS), {}, r"must be \[L,H,T,S\]"),
    "scores": (lambda a: (a * 9, TOKENS), {}, "lies between 0 and 1"),
    "not a number": (lambda a: (a * np.nan, TOKENS), {}, "lies between 0 and 1"),
    "few tokens": (lambda a: (a, TOKENS[1:]), {}, "tokens has 8 texts for 9"),
    "few keys": (lambda a: (a, TOKENS), {"key_tokens": ["x"]}, "key_tokens has 1 texts"),
    "bits": (lambda a: (a, TOKENS), {"bits": 4}, "bits=4 must be 8 or 16"),
    "other size": (lambda a: (a, TOKENS), {"compare": np.zeros((L, H, T, 2))}, "the same"),
    "no second": (lambda a: (a, TOKENS), {"compare_tokens": TOKENS}, "goes with compare"),
    "second tokens": (
        lambda a: (a, TOKENS),
        {"compare": np.zeros((L, H, T, T)), "compare_tokens": ["x"]},
        "compare_tokens has 1",
    ),
    "score shape": (lambda a: (a, TOKENS), {"scores": np.zeros((H, L))}, r"must be \[3, 4\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        attention_html(*arguments(attention(0)), **options)


def test_token_ids_are_not_texts():
    with pytest.raises(TypeError, match="list of texts"):
        attention_html(attention(0), list(range(T)))
    with pytest.raises(TypeError, match="list of texts"):
        attention_html(attention(0), "abcdefghi")


needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser at a page of two runs, asked for nothing else."""
    folder = tmp_path_factory.mktemp("page")
    file = folder / "attention.html"
    attention_html(
        attention(0),
        TOKENS,
        file,
        compare=attention(1),
        title="Two runs",
        scores=np.eye(L, H)[::-1],
    )
    with chromium.browser(folder / "profile") as browser:
        browser.open(file)
        yield browser
        assert browser.requests == [file.as_uri()]
        assert browser.problems == []


def choose(page, layer, head):
    page.mouse(f"#head-{layer}-{head}", click=True)
    page.wait("document.documentElement?.dataset.shown", f"{layer}.{head}")


def number(text):
    return float(text.split("±")[0].replace("−", "-"))


def set_view(page, view):
    page.evaluate(
        f"(() => {{ const s = document.getElementById('view'); s.value = '{view}';"
        "s.dispatchEvent(new Event('change')); })()"
    )


@needs_browser
def test_browser_shows_the_numbers_of_both_runs(page):
    first, second = attention(0), attention(1)
    for layer, head, query, key in [(0, 1, 5, 2), (2, 3, 8, 8), (1, 0, 4, 0)]:
        choose(page, layer, head)
        page.mouse(f"#queries-{query}", click=True)  # held
        page.mouse(f"#keys-{key}")
        where = page.text("#pair")
        assert f"layer {layer} head {head}" in where
        assert f"query {query} " in where and f"key {key} " in where
        want = first[layer, head, query, key], second[layer, head, query, key]
        shown = [page.text(f"#value-{run}") for run in (0, 1)]
        for text, value in zip(shown, want):
            error = float(text.split("±")[1])
            assert abs(number(text) - value) <= error + 1e-6 and error < 2e-5
        gap = number(page.text("#value-difference").replace("+", ""))
        assert gap == pytest.approx(want[0] - want[1], abs=4e-5)
        page.press("Escape")


@needs_browser
def test_browser_lists_the_strongest_keys_of_a_hovered_query(page):
    choose(page, 1, 2)
    page.mouse("#queries-7")
    rows = page.evaluate(
        "[...document.querySelectorAll('#strongest tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    row = attention(0)[1, 2, 7]
    assert [int(cells[0]) for cells in rows] == np.argsort(-row)[:5].tolist()
    for cells in rows:
        assert float(cells[2]) == pytest.approx(row[int(cells[0])], abs=2e-5)
        assert float(cells[3]) == pytest.approx(attention(1)[1, 2, 7, int(cells[0])], abs=2e-5)
    tint = "getComputedStyle(document.querySelector('#keys-{}')).backgroundColor"
    strong, weak = (page.evaluate(tint.format(n)) for n in (np.argmax(row), 8))
    assert strong != weak == "rgba(0, 0, 0, 0)"  # key 8 comes after query 7


@needs_browser
def test_browser_reads_the_matrix_under_the_mouse(page):
    choose(page, 2, 1)
    query, key = 6, 3
    page.mouse(".matrix canvas", at=((key + 0.5) / T, (query + 0.5) / T))
    assert f"query {query} " in page.text("#pair") and f"key {key} " in page.text("#pair")
    assert number(page.text("#value-0")) == pytest.approx(attention(0)[2, 1, query, key], abs=2e-5)


@needs_browser
def test_browser_shows_the_difference(page):
    choose(page, 0, 0)
    set_view(page, "difference")
    gap = attention(0)[0, 0] - attention(1)[0, 0]
    label = page.evaluate("document.querySelector('.matrix canvas').getAttribute('aria-label')")
    assert float(label.split()[-1]) == pytest.approx(np.abs(gap).max(), abs=4e-5)
    page.mouse("#keys-0")  # no query held: the queries that differ most at this key
    rows = page.evaluate("[...document.querySelectorAll('#strongest tbody tr')].map(r => "
                         "[r.cells[0].textContent, r.cells[2].textContent])")  # fmt: skip
    query, text = rows[0]
    assert int(query) == np.abs(gap[:, 0]).argmax()
    assert float(text.replace("−", "-")) == pytest.approx(gap[int(query), 0], abs=4e-5)
    set_view(page, "1")
    assert page.text("figcaption") == "corrupt"
    page.mouse("#keys-0")
    set_view(page, "both")
    assert page.evaluate("document.querySelectorAll('.matrix').length") == 2


@needs_browser
def test_browser_is_walked_with_the_keyboard(page):
    choose(page, 0, 0)
    page.evaluate("document.getElementById('head-0-0').focus()")
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        page.press(key)
    page.wait("document.documentElement?.dataset.shown", "1.1")
    page.evaluate("document.getElementById('queries-0').focus()")
    for key in ("End", "ArrowLeft", "Enter"):
        page.press(key)
    page.evaluate("document.getElementById('keys-0').focus()")
    page.press("ArrowRight")
    assert f"query {T - 2} " in page.text("#pair") and "key 1 " in page.text("#pair")
    assert number(page.text("#value-0")) == pytest.approx(attention(0)[1, 1, T - 2, 1], abs=2e-5)
    assert page.evaluate("document.querySelectorAll('#keys [tabindex=\"0\"]').length") == 1
    page.press("Escape")
    assert page.text("#pair") == "layer 1 head 1"


@needs_browser
def test_browser_opens_at_the_highest_score_and_keeps_texts_texts(page):
    page.evaluate("location.reload()")
    page.wait("document.documentElement?.dataset.shown", "0.2")  # of eye(3, 4) upside down
    for n, token in enumerate(TOKENS):
        assert page.text(f"#queries-{n}") == token.replace("\n", "⏎") or token == ""
    assert page.evaluate("document.title") == "Two runs"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.mouse("#theme", click=True)
    page.wait(f"getComputedStyle(document.body).backgroundColor !== '{before}'")
    page.requests.pop()  # the reload itself


@needs_browser
@pytest.mark.slow
def test_512_tokens_of_144_heads(tmp_path):
    """The size of GPT-2 small at half its length: the page stays usable."""
    values = attention(0, (12, 12, 512, 512))
    file = tmp_path / "large.html"
    attention_html(values, [f" t{n}" for n in range(512)], file)
    assert file.stat().st_size < 25e6
    with chromium.browser(tmp_path / "profile") as browser:
        browser.open(file)
        choose(browser, 11, 7)
        browser.mouse("#queries-500", click=True)
        browser.mouse("#keys-444")
        text = browser.text("#value-0")
        assert abs(number(text) - values[11, 7, 500, 444]) <= float(text.split("±")[1]) + 1e-4
        assert browser.requests == [file.as_uri()] and browser.problems == []
