"""A golden set of our own: one utterance, really sampled, recorded at every stage.

In: a model directory, a recording and its transcript, a text. Out: a directory that `run` accepts,
and in it the artifacts of the older harness (serving.md, g). The directory appears whole or not
at all. What is recorded is what the stages compute, so there is no second way to compute it.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from cosyvoice.audio import open_recording
from cosyvoice.errors import BadRequest
from cosyvoice.pcm import save
from cosyvoice.version import __version__

from .found import Computed, Fact
from .goldens import INDEX, GoldenSet, Part, Place
from .kinds import RECORDING, kind_of
from .run import steady, tell_stderr
from .stages import STAGES, Stage
from .subject import Subject
from .take import SAMPLING_TENSORS, Line, Take, give, give_scores, ids, speak


def dump(
    model_dir: Path, prompt_wav: Path, text: str, *, prompt_text: str, out: Path, seed: int = 0
) -> None:
    """Speak the first sentence of `text` and record everything into the new directory `out`.

    Raises BadRequest where the input cannot be spoken or `out` has something in it, and
    ModelFilesError where the model directory is incomplete.
    """
    line = Line(open_recording(prompt_wav), prompt_text, text, seed)
    with _new_directory(Path(out).absolute()) as folder, steady():
        prompt_file = f"prompt{Path(prompt_wav).suffix}"
        (folder / prompt_file).write_bytes(line.recording.data)
        goldens = GoldenSet(folder, specs={}, params={}, notes={})
        subject = Subject(Path(model_dir), goldens)
        tell_stderr("speaking")
        take = speak(subject, line)
        give(goldens, subject, take, prompt_file=prompt_file)
        for stage in STAGES:
            tell_stderr(f"recording stage {stage.stem}")
            _record(stage, goldens, subject)
        about = {"set": "dump", "model": str(model_dir), "seed": seed}
        versions = {"cosyvoice": __version__, "torch": torch.__version__}
        _write(goldens, about={**about, "versions": versions})
        _write_artifacts(goldens, subject, take)


def _record(stage: Stage, goldens: GoldenSet, subject: Subject) -> None:
    """Let a stage compute from what is given, and keep all of it that has a kind."""
    part = Part(goldens, stage.stem)
    if part.file == SAMPLING_TENSORS:
        give_scores(goldens)
    tensors = goldens.tensors.setdefault(part.file, {})
    for found in stage.compute(part, subject):
        match found:
            case Computed(name, value) if kind_of(part.specs, name):
                tensors[name] = value
            case Fact(place, value, file):
                _put(goldens.documents[file or part.text_file], place, value)


def _put(document: Any, place: Place, value: Any) -> None:
    for key in place[:-1]:
        document = document[key]
    document[place[-1]] = value


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` when the block ends, and vanishes when it fails."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadRequest(f"{out} exists and is not an empty directory: name a new one")
    hidden = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        hidden.mkdir(parents=True)
        yield hidden
        if out.exists():
            out.rmdir()
        hidden.rename(out)
    except OSError as error:
        reason = error.strerror or error
        raise BadRequest(f"cannot write {out}: {reason}; name another directory") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(goldens: GoldenSet, *, about: Mapping[str, Any]) -> None:
    index: dict[str, Any] = {"about": about, "params": goldens.params, "notes": goldens.notes}
    index["tensors"] = {}
    for file, tensors in goldens.tensors.items():
        if not tensors:  # texts have none
            continue
        _save_tensors(goldens.folder / file, tensors)
        for name, tensor in tensors.items():
            spec = kind_of(goldens.specs[file], name)
            assert spec is not None, f"{file}:{name} was given without a kind"
            index["tensors"][f"{file}:{name}"] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "tolerance": spec.tolerance,
            }
    for file, document in {**goldens.documents, INDEX: index}.items():
        content = json.dumps(document, ensure_ascii=False, indent=1)
        (goldens.folder / file).write_text(content, encoding="utf-8")


def _write_artifacts(goldens: GoldenSet, subject: Subject, take: Take) -> None:
    """What the older harness exchanged, under its names."""
    features = goldens.tensors["2_features.safetensors"]
    voice = subject.encoder.encode(take.line.recording)
    frontend = {
        "speech_tokens": voice.tokens[None],
        "speaker_embedding": voice.embedding[None],
        "speech_feat": voice.mel[None],  # before it is cut to two frames per token
        "whisper_mel": features[f"{RECORDING}.whisper128"],
    }
    prompt, tokens = take.request.prompt, ids(take.performance.tokens)[None]
    audio = take.performance.audio
    debug = {
        "text": ids(take.text_ids)[None],
        "prompt_text": ids(prompt.llm_text)[None],
        "llm_prompt_speech_token": ids(prompt.llm_speech)[None],
        "llm_embedding": prompt.flow.embedding[None],
        "speech_tokens": tokens,
        "token": tokens,
        "prompt_token": ids(prompt.flow.tokens)[None],
        "prompt_feat": prompt.flow.mel[None],
        "embedding": prompt.flow.embedding[None],
        "python_flow_output": take.performance.mel,
        "python_audio_output": audio,
        "python_hift_source": take.excitation,
        "rand_noise": subject.own_flow_noise[None],
    }
    _save_tensors(goldens.folder / "frontend_artifacts.safetensors", frontend)
    _save_tensors(goldens.folder / "debug_artifacts.safetensors", debug)
    save(goldens.folder / "debug_artifacts.wav", audio[0].numpy())


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # The format knows no views and no shared memory; its own writer makes files nobody else reads.
    own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    path.write_bytes(serialize(own))
