"""The reference's documented usage, unchanged.

Run: python example.py [MODEL_DIR [RECORDING [TRANSCRIPT]]]
"""

import sys
from importlib.resources import files

import soundfile

from cosyvoice.cli.cosyvoice import AutoModel

ASSETS = files("cosyvoice") / "assets"
PREFIX = "You are a helpful assistant.<|endofprompt|>"


def main(
    model_dir: str | None = None,
    prompt_wav: str = str(ASSETS / "sample.wav"),
    prompt_text: str = (ASSETS / "sample.txt").read_text("utf-8").strip(),
) -> None:
    cosyvoice = AutoModel(model_dir=model_dir)
    text = "The birch canoe slid on the smooth planks."
    spoken = {
        "zero_shot": cosyvoice.inference_zero_shot(text, PREFIX + prompt_text, prompt_wav),
        "cross_lingual": cosyvoice.inference_cross_lingual(PREFIX + text, prompt_wav),
        "instruct2": cosyvoice.inference_instruct2(
            text, "You are a helpful assistant. Speak slowly.<|endofprompt|>", prompt_wav
        ),
        "vc": cosyvoice.inference_vc(prompt_wav, prompt_wav, stream=True),
    }
    for mode, chunks in spoken.items():
        for i, chunk in enumerate(chunks):
            name = f"{mode}_{i}.wav"
            soundfile.write(name, chunk["tts_speech"][0].numpy(), cosyvoice.sample_rate, "PCM_16")
            print(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
