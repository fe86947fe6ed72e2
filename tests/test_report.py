"""The report in a real browser, calibration, and records of runs to expect."""

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile as sf
from flax import nnx
from small_run import PATCHES, make_config, make_data, make_run

from patchwave_jax import expected, report
from patchwave_jax.data.index import open_split
from patchwave_jax.errors import EXIT_CODE
from patchwave_jax.evaluation import evaluator as evaluator_module
from patchwave_jax.evaluation import measure, protocol
from patchwave_jax.evaluation.calibration import EDGES, calibrate
from patchwave_jax.runtime.mesh import make_mesh

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A run with a checkpoint, metrics (the last line cut short) and a generated clip."""
    directory = tmp_path_factory.mktemp("run")
    make_run(directory, make_config(data_dir))
    rows = []
    for step in range(1, 4):
        train = {"learning_rate": 1e-3, "targets_per_second": 1e4, "targets": step * 100}
        bits = {"nll_bits": 5 - step, "nll_nats": 3.0}
        rows.append({"step": step, "kind": "train", "minutes": step, **bits, **train})
        rows.append({"step": step, "kind": "validation", "minutes": step, **bits})
    lines = [json.dumps(row) for row in rows]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "ki')
    (directory / "samples").mkdir()
    sf.write(directory / "samples" / "000.wav", np.arange(8_000, dtype=np.int16), 16_000)
    about = {"prompt": "<script>alert(1)</script>", "temperature": 0.9}
    (directory / "samples" / "000.json").write_text(json.dumps(about))
    return directory


@pytest.fixture(scope="module")
def page(run):
    report.main([f"--workdir={run}", "--split=train", "--max_targets=4000"])
    return run / "report.html"


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [(tag, value) for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_network_and_escapes_what_it_is_given(page):
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.sources
    assert all(value.startswith("data:") for _, value in links.sources)
    assert not re.search(r"@import|url\(", text)
    assert "script" not in links.tags
    assert "&lt;script&gt;alert(1)" in text
    for uri in (value for tag, value in links.sources if tag == "audio"):
        assert base64.b64decode(uri.partition(",")[2])[:4] == b"RIFF"
    sizes = [len(value) for tag, value in links.sources if tag == "img"]
    assert len(sizes) >= 7
    assert min(sizes) > 2_000


def test_the_page_holds_what_evaluation_says(page, run, data_dir):
    evaluator, params, _ = evaluator_module.load(run)
    split = open_split(data_dir, "audio_folder", "train")
    result = measure.evaluate_split(evaluator, params, split, max_targets=4_000)
    text = page.read_text()
    assert str(result) in text
    assert "classical baseline" in text
    assert all(name in text for r in split.recordings for name in [r.name])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_in_a_browser(page, tmp_path, width):
    """Every picture is drawn, every player has its audio, and nothing sticks out sideways.

    Headless windows have a least width of their own, so a phone is a frame of its width.
    """
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"""<pre id="out">-</pre><iframe id="f" style="width:{width}px;height:900px"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, images = [...page.images];
  const outside = [...page.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre")
    && e.getBoundingClientRect().right > {width} + 1).length;
  document.getElementById("out").textContent = JSON.stringify({{
    wide: page.documentElement.scrollWidth, outside,
    images: images.length, drawn: images.filter(i => i.complete && i.naturalWidth > 50).length,
    audio: page.querySelectorAll("audio").length,
    size: parseFloat(getComputedStyle(page.body).fontSize),
  }});
}};
frame.srcdoc = {json.dumps(page.read_text())};
</script>"""
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
        "--virtual-time-budget=10000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert match
    found = json.loads(match[1])
    assert found["wide"] <= width
    assert found["outside"] == 0
    assert found["drawn"] == found["images"] >= 7
    assert found["audio"] >= 2
    assert found["size"] >= 15


def test_bad_input_is_one_clear_line_and_nothing_is_overwritten(page, run, tmp_path, capsys):
    before = page.read_bytes()
    for flags, message in (
        ([f"--workdir={run}"], "--overwrite"),
        ([f"--workdir={tmp_path}"], "holds no checkpoints"),
        ([f"--workdir={tmp_path}/none"], "holds no checkpoints"),
        ([f"--workdir={run}", "--overwrite", "--split=holdout"], "no split 'holdout'"),
        ([f"--workdir={run}", "--overwrite", "--generated=nowhere"], "is not a folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            report.main(flags)
        assert stopped.value.code == EXIT_CODE
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert page.read_bytes() == before


# Calibration.


def test_calibration_counts_what_a_loop_counts(data_dir):
    """Every code of a thinned set of targets, in bins of the probability the model states."""
    config = make_config(data_dir)
    evaluator = evaluator_module.Evaluator(config, make_mesh())
    model = config.build_model(nnx.Rngs(0))
    dense = jax.jit(lambda x: model.logits(x, 1))
    split = open_split(data_dir, "audio_folder", "test")
    targets = measure.choose_targets(config, split)
    calibration = calibrate(evaluator, nnx.state(model), targets)
    codes = targets.codes(0)[:]
    windows = protocol.plan([codes.size], config, PATCHES)
    stated, cases, came = np.zeros((3, len(EDGES) - 1))
    right = count = 0
    for window in windows:
        segment = protocol.segment(window, codes, config)
        logits = np.asarray(dense(segment[None]))[0].astype(np.float64)
        table = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for t in range(window.first, window.end):
            row = table[t - window.first]
            for code in range(256):
                i = max(0, min(int(np.digitize(row[code], EDGES)) - 1, len(EDGES) - 2))
                cases[i] += 1
                stated[i] += row[code]
                came[i] += code == codes[t]
            right += row.argmax() == codes[t]
            count += 1
    assert calibration.targets == count == codes.size
    np.testing.assert_allclose(calibration.cases, cases, atol=3)
    np.testing.assert_allclose(calibration.came, came, atol=3)
    np.testing.assert_allclose(calibration.stated * calibration.cases, stated, rtol=2e-2, atol=1e-4)
    assert calibration.top_right == pytest.approx(right / count)
    assert 0 <= calibration.error <= 1


# Records.


def test_a_record_matches_its_run_and_only_that(run, data_dir, tmp_path, capsys):
    expected.main([f"--workdir={run}", "--name=small", f"--out={tmp_path}"])
    assert (
        "**small**: audio_folder, objective dense, quantiser mulaw, context up to 240"
        in capsys.readouterr().out
    )
    (known,) = expected.records(tmp_path)
    assert (known.steps, known.validation_bits) == ((1, 2, 3), (4.0, 3.0, 2.0))
    config = make_config(data_dir)
    elsewhere = make_config("elsewhere")  # the place of the data does not matter
    other = make_config(data_dir, quantiser="linear")
    assert expected.matching(config, "", [known]) == known
    assert expected.matching(elsewhere, "", [known]) == known
    assert expected.matching(other, "", [known]) is None
    assert expected.matching(config, "other data", [known]) is None
    assert "on track" in str(expected.compare(known, 2, 3.04))
    assert "1.50 bits WORSE" in str(expected.compare(known, 2, 4.5))
    assert "1.00 bits better" in str(expected.compare(known, 2, 2.0))
    assert expected.compare(known, 7, 4.5) is None
    sparse = dataclasses.replace(known, steps=(10, 20, 40))
    assert "after step 25: 2.7500 bits" in str(expected.compare(sparse, 25, 2.8))
    with pytest.raises(SystemExit):
        expected.main([f"--workdir={run}", "--name=small", f"--out={tmp_path}"])
    assert "--overwrite" in capsys.readouterr().err


def test_the_readme_shows_the_packages_records():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for known in expected.records():
        assert list(known.steps) == sorted(known.steps)
        assert len(known.steps) == len(known.validation_bits) == len(known.minutes)
        assert expected.table(known) in readme, (
            "put in what python -m patchwave_jax.expected prints"
        )
