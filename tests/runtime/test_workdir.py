"""Runs in a bucket, for which an emulator of Cloud Storage is used."""

import dataclasses
import gc
import json
import signal
import socket

import jax
import numpy as np
import pytest
import soundfile as sf
from pod.tiny import get_config
from small_run import make_config, make_data, make_run, tones
from test_distributed import HERE, Pair

from patchwave_jax import evaluate, expected, generate, report, score
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config_dict import from_config_dict
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.evaluator import load
from patchwave_jax.runtime.workdir import Workdir
from patchwave_jax.train import train

LOSSES = ("nll_nats", "learning_rate", "targets")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def bucket():
    """The file system of an empty `gs://bucket`."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://localhost:{port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which uses gRPC
        emulator = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
        gcsfs = pytest.importorskip("gcsfs")  # reads the environment when imported
        with emulator:
            yield gcsfs.GCSFileSystem()


def rows(text: str) -> list[tuple]:
    """What a run logged, except times."""
    logged = map(json.loads, text.splitlines())
    return [(r["step"], r["kind"], *(r[name] for name in LOSSES if name in r)) for r in logged]


def test_a_run_resumes_from_a_bucket_as_from_a_folder(data, bucket, tmp_path, capsys, monkeypatch):
    config = from_config_dict(get_config())
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, data_dir=data),
        run=dataclasses.replace(config.run, sample_every_steps=8, sample_seconds=0.05),
    )  # fmt: skip
    assert train(config, tmp_path / "run")
    monkeypatch.setenv("PATCHWAVE_DATA_DIR", str(tmp_path / "cache"))
    bucket.put(data, "bucket/data", recursive=True)
    bucket.pipe_file("bucket/runs/one/samples/", b"")  # the console creates folders like this
    in_bucket = dataclasses.replace(config.data, data_dir="gs://bucket/data")
    config = dataclasses.replace(config, data=in_bucket)
    place = "gs://bucket/runs/one"
    half = dataclasses.replace(config.train, num_steps=4)
    assert train(dataclasses.replace(config, train=half), place)
    # A step whose process was killed while it was saved: its last file is missing.
    for file in bucket.find("bucket/runs/one/checkpoints/4"):
        if "/4/commit" not in file:
            bucket.cp_file(file, file.replace("/4/", "/7/"))
    assert train(config, place)
    assert "resumed from step 4" in capsys.readouterr().out
    logged = bucket.cat_file("bucket/runs/one/metrics.jsonl").decode()
    assert rows(logged) == rows((tmp_path / "run/metrics.jsonl").read_text())
    found, local = load(place), load(tmp_path / "run")
    assert found[2] == local[2]
    for one, other in zip(*(jax.tree.leaves(x[1]) for x in (found, local)), strict=True):
        np.testing.assert_array_equal(one, other)
    there = {file.split("/")[3] for file in bucket.find("bucket/runs/one")}
    kept = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert there == kept

    argv = [f"--workdir={place}", "--max_targets=2000"]
    evaluate.main([*argv, f"--json={tmp_path}/one.json", "--classical", "--split=test"])
    report.main(argv)
    page = bucket.cat_file("bucket/runs/one/report.html").decode()
    assert "samples/step00000008_0.wav" in page
    assert "train --config=CONFIG.py --workdir=gs://bucket/runs/one" in page
    with pytest.raises(SystemExit):  # it exists already
        report.main(argv)
    assert "report.html exists; give --overwrite" in capsys.readouterr().err
    sf.write(tmp_path / "a.wav", tones(4_000, 0), 16_000)
    score.main([f"--workdir={place}", str(tmp_path / "a.wav")])
    assert expected.record(place, "one").steps == (4, 8)
    out = tmp_path / "clips"
    generate.main([f"--workdir={place}", f"--out={out}", "--seconds=0.01"])
    assert json.loads((out / "000.json").read_text())["checkpoint"] == place


def test_one_process_resumes_the_carried_state_of_two(data, bucket, tmp_path):
    """SampleRNN's state is sharded by rows over all devices and is resumed at any step."""
    place, log = "gs://bucket/runs/two", "bucket/runs/two/metrics.jsonl"
    command = ["-m", "patchwave_jax.train", f"--config={HERE / 'pod/tiny.py'}:samplernn"]
    command += [f"--workdir={place}", f"--config.data.data_dir={data}"]
    with Pair(tmp_path / "cache", *command, "--config.train.num_steps=100_000") as pair:
        pair.wait_until(lambda: bucket.exists(log))  # after a validation
        pair.processes[0].send_signal(signal.SIGTERM)
        outputs = pair.finish(120)
        assert [p.returncode for p in pair.processes] == [0, 0], outputs
    bucket.invalidate_cache()
    stopped = json.loads(bucket.cat_file(log).splitlines()[-1])["step"]
    there = bucket.find(f"bucket/runs/two/checkpoints/{stopped}/optimizer")
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= {file.split("/")[6] for file in there}

    config = get_config("samplernn")
    config.data.data_dir, config.train.num_steps = data, stopped + 3
    train(from_config_dict(config), place)
    train(from_config_dict(config), tmp_path / "one")
    logs = bucket.cat_file(log).decode(), (tmp_path / "one/metrics.jsonl").read_text()
    two, one = map(rows, logs)
    assert [row[:2] for row in two] == [row[:2] for row in one]
    np.testing.assert_allclose([row[2] for row in two], [row[2] for row in one], rtol=1e-5)


# When one array can't be read, orbax does not await the reads of the others.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
def test_damaged_and_forbidden_files_of_a_bucket_are_named(data, bucket, monkeypatch):
    place = "gs://bucket/runs/bad"
    make_run(place, make_config(data))
    metrics = "bucket/runs/bad/checkpoints/3/metrics/metrics"
    whole = bucket.cat_file(metrics)
    bucket.pipe_file(metrics, b'{"validation_nll_nats": 1.0}')
    moved = r"gcloud storage mv gs://bucket/runs/bad/checkpoints/3 gs://bucket/runs/bad/damaged/"
    with pytest.raises(UserError, match=f"checkpoints/3 is damaged: its metrics .* {moved}"):
        load(place)
    bucket.pipe_file(metrics, b'{"validation')
    with pytest.raises(UserError, match=f"checkpoints/3 is damaged: metrics/metrics: .* {moved}"):
        Checkpoints(place, keep=1)
    bucket.pipe_file(metrics, whole)
    load(place)
    for file in bucket.find("bucket/runs/bad/checkpoints/3/params"):
        if "/d/" in file:
            bucket.rm_file(file)
    with pytest.raises(UserError, match="checkpoints/3 can't be read: its list of arrays"):
        load(place)

    async def refuse(_, method, *args: object, **kwargs: object):
        if method in refused:
            raise PermissionError("403 Forbidden")
        return await call(_, method, *args, **kwargs)

    call, refused = type(bucket)._call, ["POST"]
    monkeypatch.setattr(type(bucket), "_call", refuse)
    workdir = Workdir(place).__enter__()
    (workdir.folder / "a").mkdir()
    (workdir.folder / "a/b").touch()
    with pytest.raises(UserError, match=r"bad/a/b can't be written: 403.*objectUser"):
        workdir.__exit__(None)
    assert not workdir.folder.exists()
    refused.append("GET")
    with pytest.raises(UserError, match=r"hidden/checkpoints can't be read: 403.*objectViewer"):
        load("gs://bucket/hidden")
    gc.collect()  # what was not awaited, before another test does


def test_missing_runs_and_buckets_are_named(bucket):
    with pytest.raises(UserError, match="gs://bucket/none holds no checkpoints; train there first"):
        load("gs://bucket/none")
    with pytest.raises(UserError, match=r"gs://other/run can't be read: nothing is there"):
        Workdir("gs://other/run").__enter__()


def test_an_unsupported_kind_of_url_is_refused(data):
    for call in (train, lambda _, place: load(place)):
        with pytest.raises(UserError, match="--workdir=s3://b/run is neither a folder nor a gs:/"):
            call(make_config(data), "s3://b/run")
    with pytest.raises(SystemExit):
        generate.main(["--workdir=gs://b/run", "--out=gs://b/clips"])


def test_a_missing_gcsfs_is_named(without_gcsfs):
    with pytest.raises(UserError, match=r"gs://b/run can't .* pip install 'patchwave-jax\[gcs\]'"):
        Workdir("gs://b/run").__enter__()
