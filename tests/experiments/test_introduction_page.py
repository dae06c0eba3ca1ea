"""The whole introduction: its numbers recomputed, and the page from a file in a browser."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.introduction import implicit, landscape, plane, sinusoids
from experiments.introduction import page as pages

pytestmark = [
    pytest.mark.slow,
    # Of Playwright, when a test fails while a browser is open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {"wide": (1280, 900), "phone": (390, 844)}
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--no-first-run"),
)
OF_SLIDERS = {
    "rate": ("plane", "rates"),
    "steps": ("plane", "steps"),
    "strength": ("plane", "strengths"),
    "innerRate": ("inner", "rates"),
    "innerSteps": ("inner", "steps"),
    "innerStrength": ("plane", "strengths"),
    "condition": ("solver", "conditions"),
    "descentSteps": ("solver", "steps"),
    "costSteps": ("costs", "steps"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page, written by the command."""
    output = tmp_path_factory.mktemp("page") / "introduction.html"
    command = [sys.executable, "-m", "experiments.introduction", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    return output


@pytest.fixture(scope="module")
def data(file):
    return pages.data_of(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install -e .[browser]"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium, for instance from apt install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, file):
    """`visit(width, scheme) -> page`; afterwards no request and no complaint may have been."""
    contexts, faults = [], []

    def open_page(width="wide", scheme="light"):
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()

        def allow_only_the_file(route):
            address = route.request.url
            if address == file.as_uri() or address.startswith("data:"):
                return route.continue_()
            faults.append(f"asked for {address}")
            return route.abort()

        page.route("**/*", allow_only_the_file)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def number(text):
    """A number as the page writes it."""
    return float(text.replace("−", "-").rstrip("%°"))


def state(page):
    """The places of all sliders, by name; of those of one name the first."""
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.slider')].reverse()"
        ".map(box => [box.dataset.state, +box.querySelector('input').value]))"
    )


def cells(page, table):
    """The rows of a table by their names, without the first column."""
    rows = page.eval_on_selector_all(
        f"#{table} tr[data-row]",
        "rows => rows.map(r => [r.dataset.row, [...r.cells].slice(1).map(c => c.textContent)])",
    )
    return dict(rows)


def test_the_page_is_small(file):
    assert file.stat().st_size < 2_000_000


def test_random_points_recomputed(data, x64):
    shown, tasks = data["plane"], plane.sample_tasks(jax.random.key(data["seed"]))
    rng, points = np.random.default_rng(0), plane.grid(shown["side"])
    for name in plane.ALGORITHMS:
        for _ in range(3):
            a, t, s, r, c = (int(rng.integers(n)) for n in pages.unpack(shown["imaml"]).shape[:5])
            place = (a, t, s, r, c) if name == "imaml" else (a, t, r, c)
            expected, _ = landscape.arrow(
                name,
                points[r, c],
                tasks,
                shown["rates"][a],
                shown["steps"][t],
                shown["strengths"][s],
            )
            found = pages.unpack(shown[name])[place]
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def test_runs_follow_the_arrows(data, x64):
    shown, tasks = data["plane"], plane.sample_tasks(jax.random.key(data["seed"]))
    theta = jnp.asarray(landscape.starts(plane.Sizes()))[2]
    for name in plane.ALGORITHMS:
        place = (1, 2, 1, 2) if name == "imaml" else (1, 2, 2)
        path = pages.unpack(data["runs"]["paths"][name])[place]
        np.testing.assert_allclose(path[0], theta, atol=2e-4)
        end = theta
        for _ in range(shown["record_every"]):
            arrow, _ = landscape.arrow(name, end, tasks, 0.2, 4, 0.5)
            end = end - shown["outer_rate"] * arrow
        np.testing.assert_allclose(path[1], end, atol=2e-4)
        assert np.abs(pages.unpack(data["runs"]["paths"][name])).max() < shown["reach"] + 2e-4


def test_reports_show_where_the_implicit_gradient_fails(data, x64):
    inner = {name: pages.unpack(x) for name, x in data["inner"].items() if isinstance(x, dict)}
    tasks = plane.sample_tasks(jax.random.key(data["seed"]))
    phi, strength = inner["minimum"][0, 2], data["plane"]["strengths"][2]
    curved = jax.hessian(plane.valley)(jnp.asarray(phi), tasks.support.targets[implicit.TASK])
    limit = 2 / (np.linalg.eigvalsh(curved)[-1] + strength)
    np.testing.assert_allclose(inner["rate_limit"][0, 2], limit, rtol=1e-3)
    past = np.array(data["inner"]["rates"]) > inner["rate_limit"][..., None]
    residual = inner["inner_residual"][..., -1]
    assert past.any() and residual[past].min() > 0.5 and residual[~past].max() < 0.2
    stopped = inner["min_curvature"] <= 0
    assert stopped.any() and inner["solve_residual"][stopped].min() > 0.1
    assert inner["solve_residual"][~stopped].max() < 1e-9


def test_sinusoids_are_fitted(data):
    shown = data["sinusoid"]
    losses = pages.unpack(shown["losses"])
    assert pages.unpack(shown["fits"]).shape == (*losses.shape, len(shown["inputs"]))
    first = losses[:, :, 0]
    assert (losses[1:, :, -1].mean(1) < 0.1 * first[1:].mean(1)).all()
    assert losses[0, :, -1].mean() > 0.5 * first[0].mean()  # the fresh one
    params = sinusoids.NETWORK.init(jax.random.key(data["seed"]), jnp.zeros((1, 1)))
    outputs = sinusoids.NETWORK.apply(params, jnp.array(shown["points"])[:, None])[:, 0]
    lowest = np.square(outputs - shown["levels"][0]).mean()
    np.testing.assert_allclose(first[0, 0], lowest, rtol=1e-4)


def test_memory_grows_with_unrolling_only(data):
    """And what the page says of it: recomputing does not help, and where iMAML becomes cheaper."""
    steps = data["costs"]["steps"]
    sizes = {name: np.array(row["bytes"]) for name, row in data["costs"].items() if name != "steps"}
    growth = {name: row[-1] / row[0] for name, row in sizes.items()}
    assert min(growth["maml"], growth["maml_recomputed"]) > 4
    assert max(growth[n] for n in ("fomaml", "reptile", "imaml")) < 1.2
    assert (sizes["maml_recomputed"] > sizes["maml"]).all()
    assert [t for t, more in zip(steps, sizes["imaml"] > sizes["maml"], strict=True) if more] == [
        t for t in steps if t <= 16
    ]


def test_query_losses_rise_while_support_losses_fall(data, x64):
    """Where the page says it: at (0.6, 0.6) after 12 steps at the largest rate."""
    place = [int(np.argmin(np.abs(plane.grid(data["plane"]["side"])[0, :, 0] - 0.6)))] * 2
    query = pages.unpack(data["plane"]["curves"])[-1, *place]
    assert (np.diff(query[:12]) < 0).all() and (np.diff(query[12:]) > 0).all()
    support = plane.sample_tasks(jax.random.key(data["seed"])).support.targets
    loss = jax.jit(jax.vmap(jax.value_and_grad(plane.valley)))
    params, losses = jnp.full(support[:, :2].shape, 0.6), []
    for _ in query:
        now, slopes = loss(params, support)
        params, losses = params - data["plane"]["rates"][-1] * slopes, [*losses, now]
    assert (np.diff(losses, axis=0) < 0).all()


def test_reports_in_order_mean_a_small_error(data):
    """Those that the page calls so."""
    inner = {name: pages.unpack(x) for name, x in data["inner"].items() if isinstance(x, dict)}
    limit = float(re.search(r"RESIDUAL_LIMIT = ([\d.]+)", pages.read("implicit.js"))[1])
    residuals = np.maximum(inner["inner_residual"], inner["solve_residual"])
    in_order = (residuals <= limit) & (inner["min_curvature"] > 0)
    exact = inner["exact"][:, :, None, None]
    error = np.linalg.norm(inner["grads"] - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert in_order.any() and error[in_order].max() < 0.01


def test_the_model_plays_well(data):
    game = data["game"]
    assert game["accuracy"] - game["ci95"] > 0.8
    np.testing.assert_allclose(np.sum(game["probabilities"], 1), 1, atol=1e-3)


def test_every_slider_moves_by_keyboard(visit, data):
    page = visit()
    sliders = page.locator(".slider")
    assert sliders.count() > 15
    for i in range(sliders.count()):
        slider, name = sliders.nth(i), sliders.nth(i).get_attribute("data-state")
        control, shown = slider.locator("input"), slider.locator("output")
        control.focus()
        page.keyboard.press("Home")
        seen = [shown.text_content()]
        for _ in range(int(control.get_attribute("max"))):
            page.keyboard.press("ArrowRight")
            seen.append(shown.text_content())
        assert len(set(seen)) == len(seen)
        assert control.get_attribute("aria-valuetext") == seen[-1]
        if name in OF_SLIDERS:
            group, values = OF_SLIDERS[name]
            assert list(map(number, seen)) == data[group][values]
        page.keyboard.press("ArrowLeft")


def check_landscape(page, data, objective):
    at, plane = state(page), data["plane"]
    place = at["rate"], at["steps"], at["row"], at["column"]
    of_implicit = (*place[:2], at["strength"], *place[2:])
    exact = (
        pages.unpack(plane["exact_unrolled"])[place]
        if objective == "unrolled"
        else pages.unpack(plane["exact_implicit"])[at["strength"], at["row"], at["column"]]
    )
    shown = cells(page, "landscape-table")
    for name in ("maml", "fomaml", "reptile", "imaml"):
        arrow = pages.unpack(plane[name])[of_implicit if name == "imaml" else place]
        length, angle, _ = shown[name]
        np.testing.assert_allclose(number(length), np.linalg.norm(arrow), rtol=6e-3)
        cosine = arrow @ exact / np.linalg.norm(arrow) / np.linalg.norm(exact)
        expected = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        np.testing.assert_allclose(number(angle), expected, atol=0.3)
    np.testing.assert_allclose(number(shown["exact"][0]), np.linalg.norm(exact), rtol=6e-3)
    text = page.text_content("#landscape-report")
    loss, residual = (number(x) for x in re.findall(r"(?:at θ|residual of) ([−\d.e]+\d)", text))
    losses = pages.unpack(plane[f"{objective}_loss"])
    where = (*place[:2], 2 * place[2], 2 * place[3])
    where = where if objective == "unrolled" else (at["strength"], *where[2:])
    np.testing.assert_allclose(loss, losses[where], rtol=6e-3)
    reported = pages.unpack(plane["inner_residual"])[of_implicit]
    np.testing.assert_allclose(residual, reported, rtol=6e-2)


def test_read_outs_equal_the_data(visit, data):
    page = visit()
    rng = np.random.default_rng(0)
    for objective in ("unrolled", "implicit"):
        page.check(f"input[value={objective}]")
        for _ in range(4):
            for name in ("rate", "steps", "strength", "column", "row"):
                control = page.locator(f"#landscape .slider[data-state={name}] input")
                control.focus()
                page.keyboard.press("Home")
                for _ in range(rng.integers(int(control.get_attribute("max")) + 1)):
                    page.keyboard.press("ArrowRight")
            check_landscape(page, data, objective)
    at = state(page)
    place = 0, at["innerStrength"], at["innerRate"], at["innerSteps"]
    for name in ("inner_residual", "solve_residual", "min_curvature"):
        shown = number(cells(page, "inner-table")[name][0])
        np.testing.assert_allclose(shown, pages.unpack(data["inner"][name])[place], rtol=6e-2)
    place = at["condition"], at["descentSteps"], at["cgSteps"]
    shown = re.search(r"error ([\d.e−]+\d)", page.text_content("#solver-report"))[1]
    np.testing.assert_allclose(
        number(shown), pages.unpack(data["solver"]["error"])[place], rtol=6e-2
    )
    for name in ("maml", "imaml"):
        kib, ms = map(number, cells(page, "costs-table")[name])
        row = data["costs"][name]
        np.testing.assert_allclose(kib, row["bytes"][at["costSteps"]] / 1024, rtol=6e-3)
        np.testing.assert_allclose(ms, 1e3 * row["seconds"][at["costSteps"]], rtol=6e-3)
    at_start = at["rate"], at["steps"], at["start"]
    path = pages.unpack(data["runs"]["paths"]["maml"])[at_start]
    ends, loss = cells(page, "runs-table")["maml"]
    np.testing.assert_allclose([*map(number, ends.rstrip(" ↗").split(","))], path[-1], atol=0.051)
    expected = pages.unpack(data["runs"]["losses"]["maml"])[at_start]
    np.testing.assert_allclose(number(loss), expected, rtol=6e-3)


def test_theta_follows_the_pointer_and_the_keys(visit):
    page = visit()
    knob = page.locator("#landscape-plot .handle")
    knob.scroll_into_view_if_needed()
    box = page.locator("#landscape-plot").bounding_box()
    knob.hover()
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.4 * box["height"], steps=5)
    page.mouse.up()
    moved = state(page)
    column, row = moved["column"], moved["row"]
    assert 3 <= column <= 8 and 10 <= row <= 15
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert (state(page)["column"], state(page)["row"]) == (column + 1, row - 1)


def test_points_of_the_sinusoid_move(visit, data):
    page = visit()
    point = page.locator("#sinusoid-plot .handle").first
    point.focus()
    for _ in data["sinusoid"]["levels"]:
        page.keyboard.press("ArrowUp")
    assert point.get_attribute("aria-valuenow") == str(round(data["sinusoid"]["levels"][-1]))
    page.locator("#sinusoid .slider input").press("End")
    page.locator("#sinusoid-plot .handle").last.press("ArrowUp")
    places = [
        data["sinusoid"]["levels"].index(float(handle.get_attribute("aria-valuenow")))
        for handle in page.locator("#sinusoid-plot .handle").all()
    ]
    losses = pages.unpack(data["sinusoid"]["losses"])
    index = np.ravel_multi_index(places, [len(data["sinusoid"]["levels"])] * len(places))
    shown = re.findall(r"AML ([\d.e−]+\d)", page.text_content("#sinusoid-report"))
    np.testing.assert_allclose([*map(number, shown)], losses[1:, index, -1], rtol=6e-2)


def test_handles_take_home_and_end(visit, data):
    page = visit()
    extent, levels = data["plane"]["extent"], data["sinusoid"]["levels"]
    for name, ends in (("landscape", [-extent, extent]), ("sinusoid", [levels[0], levels[-1]])):
        knob = page.locator(f"#{name}-plot .handle").first
        for key, end, value in zip(("Home", "End"), ("min", "max"), ends, strict=True):
            knob.press(key)
            now, bound = (knob.get_attribute(f"aria-value{x}") for x in ("now", end))
            assert float(now) == float(bound) == value


def test_a_read_out_is_spoken_when_it_stands_still(visit):
    page = visit()
    spoken = page.evaluate("""() => {
        const knob = document.querySelector("#landscape-plot .handle");
        knob.focus();
        for (const key of ["ArrowLeft", "ArrowLeft", "ArrowUp"])
            knob.dispatchEvent(new KeyboardEvent("keydown", { key }));
        return document.getElementById("spoken").textContent;
    }""")
    assert spoken == ""
    page.wait_for_function("document.getElementById('spoken').textContent !== ''")
    assert page.text_content("#spoken") == page.text_content("#landscape-report")


def test_the_game_is_played(visit, data):
    page = visit()
    game = data["game"]
    for k in range(3):
        page.locator("#game-choices button").nth(game["answers"][k]).press("Enter")
        model = int(np.argmax(game["probabilities"][k]))
        verdict = page.text_content("#game-verdict")
        assert verdict.startswith("Yes") and f"The model says {model + 1}" in verdict
        page.locator("#game-next").press("Enter")
    assert page.text_content("#game-score").startswith("You 3, model ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(visit, width, scheme):
    page = visit(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60


def test_focus_is_visible(visit):
    page = visit()
    page.locator("#landscape-plot .handle").focus()
    page.keyboard.press("ArrowLeft")
    halo = page.locator("#landscape-plot .handle .halo")
    assert float(halo.evaluate("x => getComputedStyle(x).strokeOpacity")) == 1
    page.locator("#game-next").focus()
    page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
