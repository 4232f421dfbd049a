"""metrics.jsonl survives kills and resumes; rates, FLOPs and events say what they claim."""

import io
import json
import struct

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from conan_jax import config
from conan_jax.errors import TrainingError
from conan_jax.train import metrics
from tests.train.toy_stage import toy_run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("resume, kept", [(4, [2, 4]), (5, [2, 4]), (0, []), (100, [2, 4, 6])])
def test_lines_beyond_the_restored_step_are_dropped(tmp_path, resume, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "loss": {s}.5}}\n' for s in (2, 4, 6)))
    log = metrics.JsonLines(path, resume)
    assert (log.last or {}).get("step") == (kept[-1] if kept else None)
    log.write({"step": 7})
    log.close()
    assert [line["step"] for line in lines(path)] == [*kept, 7]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', '{"step": 4}', '{"ste\n', "\x00\x00\x00\n", "[4]\n"])
def test_a_torn_last_line_is_repaired(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n' + tail)
    log = metrics.JsonLines(path, 10)
    log.write({"step": 4, "loss": 1.0})
    log.close()
    assert lines(path) == [{"step": 2}, {"step": 4, "loss": 1.0}]


def test_a_line_is_on_disk_before_close_and_nan_is_null(tmp_path):
    log = metrics.JsonLines(tmp_path / "m" / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert lines(tmp_path / "m" / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None}]
    assert metrics.last_record(tmp_path / "m" / "metrics.jsonl")["step"] == 1
    log.close()


def test_a_full_disk_is_a_plain_error(tmp_path, monkeypatch):
    log = metrics.JsonLines(tmp_path / "metrics.jsonl", 0)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "_file", Full())
    with pytest.raises(TrainingError, match="metrics.jsonl could not be written: No space left.*make room"):
        log.write({"step": 1})


def test_rates_leave_the_compiling_step_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = metrics.Meter(flops_per_token=10.0, peak_flops=1e4, seconds=7.0)
    now[0] += 50
    meter.step(1000.0)
    assert meter.read() == {"seconds": 57.0}
    for _ in range(4):
        now[0] += 0.5
        meter.waited(0.1)
        meter.step(300.0)
    rates = meter.read()
    assert rates == pytest.approx({"seconds": 59.0, "steps_per_second": 2.0, "tokens_per_second": 600.0, "data_wait": 0.2, "mfu": 0.6})


def test_flops_of_the_full_model_by_the_stated_convention():
    """Stage 1 at 4096 tokens: 6 x 961,605,120 + 12 x 8 x 3584 x 4096 + 6 x 151,040 x 3584 (a vocabulary share of about a third)."""
    model, mix = config.Model(), (config.Mix("d"),)
    lm = config.LMStage(name="p", kind="pretrain", steps=1, datasets=mix, sequence_length=4096)
    weak = config.WeakStage(name="w", steps=1, datasets=mix, buckets=(config.Bucket(64, 512),))
    assert metrics.flops_per_token(model, lm, 961_605_120) == 5_769_630_720 + 1_409_286_144 + 3_247_964_160
    assert metrics.flops_per_token(model, weak, 961_605_120) == 5_769_630_720 + 12 * 8 * 3584 * 512


def events(folder):
    """TFRecord framing by hand: length, crc, payload, crc."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12:12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + size:]
    return found


def recorded(folder, steps, log_every=5, start=0, terminal=False):
    stage = toy_run(steps, log_every=log_every).stages[0]
    out = io.StringIO()
    recorder = metrics.Recorder(folder, stage, start, Console(file=out, force_terminal=terminal, width=200), 1.0, None)
    for step in range(start + 1, steps + 1):
        bad = step in (7, 8)
        skips = {"skipped": min(max(step - 6, 0), 2), "skipped_in_row": float(bad)}
        recorder.record(step, {"loss": 1 / step, "tokens": 8.0, "grad_norm": 1.0, "learning_rate": 1e-3, "absent": float("nan"), **skips}, {})
    recorder.close()
    return out.getvalue()


def test_records_come_at_log_every_at_the_end_and_at_each_skip(tmp_path):
    text = recorded(tmp_path, 12)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [5, 7, 8, 10, 12]
    assert [(tag, step) for tag, step, _ in events(tmp_path / "tensorboard") if tag == "loss"] == [("loss", s) for s in (5, 7, 8, 10, 12)]
    assert dict(((s, round(v, 6)) for t, s, v in events(tmp_path / "tensorboard") if t == "loss"))[5] == 0.2
    printed = text.splitlines()
    assert printed[0].startswith("toy 5/12") and printed[-1].startswith("toy 12/12")
    assert "steps/s" in printed[-1] and "ETA 0 s" in printed[-1]
    assert not [tag for tag, _, _ in events(tmp_path / "tensorboard") if tag == "absent"]


def test_a_resumed_recorder_continues_time_and_steps(tmp_path):
    recorded(tmp_path, 10)
    before = lines(tmp_path / "metrics.jsonl")
    recorded(tmp_path, 20, start=5)
    after = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in after] == [5, 7, 8, 10, 15, 20] and after[0] == before[0]
    assert after[-1]["seconds"] >= before[0]["seconds"]


def test_the_bar_shows_rate_eta_and_figures_on_a_terminal(tmp_path):
    text = recorded(tmp_path, 12, terminal=True)
    assert "12/12" in text and "ETA" in text and "steps/s" in text and "lr 0.001" in text
