"""The command line: every command on the golden model, every bad input in one line and exit 2."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cosyvoice import __version__
from cosyvoice.cli import main

TEXT = "Good morning! How are you today?"


class Run:
    """Calls `main` as the console script would."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        self._monkeypatch = monkeypatch
        self._captured = capsysbinary
        self.out = b""
        self.err = ""

    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> int:
        self._monkeypatch.setattr(sys, "argv", ["cosyvoice", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = self._captured.readouterr()
        self.out, self.err = captured.out, captured.err.decode()
        code = exit_info.value.code
        return code if isinstance(code, int) else 0


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
    golden_model: Path,
    tmp_path: Path,
) -> Run:
    monkeypatch.setenv("COSYVOICE_MODEL_DIR", str(golden_model))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return Run(monkeypatch, capsysbinary)


@pytest.fixture
def wav(golden: Path) -> str:
    return str(golden / "prompt_b.wav")


def heard(path: Path) -> float:
    """Seconds of a mono 24 kHz 16-bit file that is not silent."""
    info = soundfile.info(path)
    assert (info.samplerate, info.channels) == (24_000, 1)
    samples, _ = soundfile.read(path)
    assert np.sqrt(np.mean(samples**2)) > 1e-3
    return float(info.duration)


def test_version_and_help(run: Run) -> None:
    assert run("--version") == 0
    assert run.out.decode().strip() == f"cosyvoice {__version__}"
    for command in ((), ("synthesize",), ("convert",), ("voices", "add"), ("parity",),
                    ("parity", "dump"), ("init-model",)):  # fmt: skip
        assert run(*command, "--help") == 0
        if command:
            assert b"Example" in run.out


def test_synthesize_speaks_without_any_option(run: Run) -> None:
    assert run("synthesize", TEXT) == 0
    assert run.out.decode().strip() == "out.wav"
    assert "golden/model" in run.err
    assert "bundled sample voice" in run.err
    assert "seed: " in run.err
    assert 0.5 < heard(Path("out.wav")) < 30
    assert soundfile.info("out.wav").subtype == "PCM_16"


@pytest.mark.parametrize(
    "options",
    [
        ("--prompt-text", "What is said."),
        (),
        ("--instruct", "Speak slowly."),
        ("--mode", "cross_lingual", "--speed", "1.3"),
        ("--mode", "zero_shot", "--prompt-text", "What is said.", "--stream"),
        ("--prompt-text", "What is said.", "--stream", "--speed", "0.8"),
        ("--compat", "reference", "--mode", "zero_shot", "--stream", "--seed", "6",
         "--prompt-text", "You are a helpful assistant.<|endofprompt|>What is said."),
    ],
)  # fmt: skip
def test_synthesize_in_every_mode(run: Run, wav: str, options: tuple[str, ...]) -> None:
    assert run("synthesize", TEXT, "--prompt-wav", wav, "--seed", "3", *options) == 0, run.err
    assert heard(Path("out.wav")) > 0.3


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus", "pcm"])
def test_synthesize_writes_every_format(run: Run, wav: str, suffix: str) -> None:
    out = Path(f"speech.{suffix}")
    assert run("synthesize", TEXT, "--prompt-wav", wav, "--seed", "3", "-o", out) == 0, run.err
    if suffix != "pcm":
        assert heard(out) > 0.3
    else:
        assert out.stat().st_size > 0.3 * 48_000


def test_text_from_file_stdin_and_to_stdout(run: Run, wav: str) -> None:
    Path("text.txt").write_text(TEXT)
    common = ("--prompt-wav", wav, "--seed", "3", "-o", "-")
    assert run("synthesize", TEXT, *common) == 0
    spoken = run.out
    assert spoken[:4] == b"RIFF"
    assert run("synthesize", "--text-file", "text.txt", *common) == 0
    assert run.out == spoken
    assert run("synthesize", "-", *common, stdin=TEXT.encode()) == 0
    assert run.out == spoken


def test_same_seed_same_file_and_another_seed_another(run: Run, wav: str) -> None:
    files = []
    for seed in (1, 1, 2):
        assert run("synthesize", TEXT, "--prompt-wav", wav, "--seed", str(seed)) == 0
        files.append(Path("out.wav").read_bytes())
    assert files[0] == files[1] != files[2]


def test_convert(run: Run, golden: Path, wav: str) -> None:
    source = golden / "prompt_a.wav"
    assert run("convert", "--source", source, "--prompt-wav", wav, "-o", "vc.wav") == 0
    assert heard(Path("vc.wav")) == pytest.approx(3.5, abs=0.2)


def test_voices_are_kept_used_and_removed(run: Run, wav: str) -> None:
    assert run("voices", "list") == 0
    assert run.out == b""
    assert run("voices", "add", "ada", "--prompt-wav", wav, "--prompt-text", "What is said.",
               "--consent", "Ada, by letter") == 0  # fmt: skip
    assert run("voices", "list", "--json") == 0
    assert json.loads(run.out) == ["ada"]
    assert run("voices", "show", "ada") == 0
    assert json.loads(run.out)["consent"] == "Ada, by letter"
    assert run("synthesize", TEXT, "--voice", "ada", "--seed", "3", "-o", "a.wav") == 0
    assert run("synthesize", TEXT, "--prompt-wav", wav, "--prompt-text", "What is said.",
               "--seed", "3", "-o", "b.wav") == 0  # fmt: skip
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()
    assert run("voices", "remove", "ada") == 0
    assert run("synthesize", TEXT, "--voice", "ada") == 2
    assert "ada" in run.err


def test_init_model_speaks(run: Run) -> None:
    pytest.importorskip("onnx")
    assert run("init-model", "--preset", "nano", "--seed", "1", "-o", "nano") == 0
    assert run("synthesize", TEXT, "--model-dir", "nano", "--seed", "1") == 0, run.err
    assert heard(Path("out.wav")) > 0.3
    assert run("init-model", "-o", "nano") == 2


def test_parity_of_one_stage(run: Run, golden: Path, golden_model: Path) -> None:
    arguments = ("parity", "--model-dir", golden_model, "--goldens", golden, "--stage", "5")
    assert run(*arguments) == 0, run.err
    report = json.loads(run.out.decode().splitlines()[-1])
    assert report["passed"] is True
    assert report["n_failed"] == 0
    assert report["n_rows"] == len(report["rows"]) > 30


def one_line(text: str) -> bool:
    """The last line is the error; the lines before are remarks, none of them a traceback."""
    return text.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in text


def test_bad_input_is_one_line_and_exit_2(run: Run, wav: str) -> None:
    Path("text.wav").write_text("this is no recording")
    Path("empty.wav").write_bytes(b"")
    silence = np.zeros(32_000, np.float32)
    soundfile.write("silence.wav", silence, 16_000)
    noise = np.random.default_rng(0).normal(size=31 * 16_000) * 0.1
    soundfile.write("long.wav", noise, 16_000)
    soundfile.write("low.wav", noise[:16_000], 8_000)
    lying = bytearray(Path(wav).read_bytes())
    lying[40:44] = (2**31).to_bytes(4, "little")
    Path("lying.wav").write_bytes(lying)
    Path("latin1.txt").write_bytes("Grüße".encode("latin-1"))
    voice = ("--prompt-wav", wav)
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("no_such.wav", (TEXT, "--prompt-wav", "no_such.wav")),
        ("text.wav", (TEXT, "--prompt-wav", "text.wav")),
        ("empty.wav", (TEXT, "--prompt-wav", "empty.wav")),
        ("silent", (TEXT, "--prompt-wav", "silence.wav")),
        ("30 s", (TEXT, "--prompt-wav", "long.wav")),
        ("16000 Hz", (TEXT, "--prompt-wav", "low.wav")),
        ("lying.wav", (TEXT, "--prompt-wav", "lying.wav")),
        ("not a file", (TEXT, "--prompt-wav", ".")),
        ("nothing to speak", ("", *voice)),
        ("nothing to speak", ("?!...", *voice)),
        ("give the text once", voice),
        ("give the text once", (TEXT, "--text-file", "latin1.txt", *voice)),
        ("UTF-8", ("--text-file", "latin1.txt", *voice)),
        ("no_such.txt", ("--text-file", "no_such.txt", *voice)),
        ("nobody", (TEXT, "--voice", "nobody")),
        ("speed", (TEXT, *voice, "--speed", "0")),
        ("mode", (TEXT, *voice, "--mode", "opera")),
        ("instruct2", (TEXT, *voice, "--mode", "instruct2")),
        ("toaster", (TEXT, *voice, "--device", "toaster")),
        ("int3", (TEXT, *voice, "--dtype", "int3")),
        ("compat", (TEXT, *voice, "--compat", "maybe")),
        ("no_such_dir", (TEXT, *voice, "--model-dir", "no_such_dir")),
        ("no_such_dir", (TEXT, *voice, "-o", "no_such_dir/out.wav")),
        ("doc", (TEXT, *voice, "-o", "speech.doc")),
        ("endofprompt", (TEXT, *voice, "--compat", "reference", "--prompt-text", "Said.")),
    ]
    for expected, arguments in cases:
        assert run("synthesize", *arguments) == 2, (arguments, run.err)
        assert one_line(run.err), run.err
        assert expected in run.err, (expected, run.err)
    assert not Path("out.wav").exists()
    assert run("convert", "--source", "no_such.wav", "--prompt-wav", wav) == 2
    assert run("voices", "show", "../../etc/passwd") == 2
    assert run("parity") == 2
    assert run("parity", "--model-dir", "no_such_dir", "--goldens", "no_such_dir") == 2


def test_remarks_in_a_log_have_no_empty_lines(run: Run, wav: str) -> None:
    assert run("synthesize", TEXT, "--prompt-wav", wav, "--seed", "3") == 0
    assert all(line.strip() for line in run.err.splitlines()), run.err


def test_full_stdout_is_one_line(golden_model: Path, wav: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cosyvoice", "synthesize", TEXT, "--prompt-wav", wav,
             "--model-dir", str(golden_model), "-o", "-"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert one_line(done.stderr), done.stderr
    assert "No space left" in done.stderr


def test_ctrl_c_stops_at_once_and_leaves_no_file(golden_model: Path, tmp_path: Path) -> None:
    text = "This is a rather long sentence that is spoken again and again. " * 400
    (tmp_path / "long.txt").write_text(text)
    command = [sys.executable, "-m", "cosyvoice", "synthesize", "--text-file", "long.txt",
               "--model-dir", str(golden_model)]  # fmt: skip
    # One thread: on a busy machine two would wait for each other, and so would we.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("seed:"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert [file.name for file in tmp_path.iterdir()] == ["long.txt"]
