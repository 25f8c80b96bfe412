"""Draw and encode the quickstart's pictures, sounds and clips.

Coordinates are pixels of a 64 x 64 canvas, waves float32 16 kHz mono.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import soundfile
from PIL import Image

SAMPLE_RATE = 16000
TILE_PX = 64
NUM_FRAMES, FRAMES_A_SECOND = 4, 2
DETUNE_CENTS = 50  # half the step to the next pitch: a note is never nearer to a held-out one than to its own
PAUSE_SECONDS = (0.03, 0.18)  # the two longest words of any voice, 1.72 s, and their pauses stay within 2.1 s
X264_OPTIONS = {"preset": "ultrafast", "tune": "zerolatency", "crf": "14"}
AAC_OPTIONS = {"aac_coder": "fast"}  # a sixth of the time of the default, which is made for music
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def gradient(rng: np.random.Generator) -> Image.Image:
    """A canvas that fades between two random light colours in a random direction."""
    start, end = rng.integers(150, 256, size=(2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, TILE_PX, dtype=np.float32)
    share = np.clip(0.5 + np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None], 0, 1)[..., None]
    return Image.fromarray((start * (1 - share) + end * share).astype(np.uint8))


def paste(canvas: Image.Image, picture: Image.Image, size_px: int, x: int, y: int) -> None:
    """Put a picture, scaled to `size_px`, with its upper left corner at (x, y)."""
    scaled = picture.resize((size_px, size_px), Image.Resampling.BILINEAR)
    canvas.paste(scaled, (x, y), scaled)


def moving_frames(rng: np.random.Generator, picture: Image.Image, direction: str) -> list[Image.Image]:
    """Equal steps of 6 to 9 px along one axis, on a still background."""
    size_px, step_px = int(rng.integers(28, 37)), int(rng.integers(6, 10))
    room = TILE_PX - size_px
    travel = min((NUM_FRAMES - 1) * step_px, room)
    along = int(rng.integers(0, room - travel + 1))
    across = int(rng.integers(0, room + 1))
    background = gradient(rng)
    dx, dy = DIRECTIONS[direction]
    frames = []
    for index in range(NUM_FRAMES):
        done = travel * index // (NUM_FRAMES - 1)
        place = along + (done if dx + dy > 0 else travel - done)
        frame = background.copy()
        paste(frame, picture, size_px, *((place, across) if dx else (across, place)))
        frames.append(frame)
    return frames


def join_words(rng: np.random.Generator, waves: list[np.ndarray]) -> np.ndarray:
    """Waves in a row with random pauses before each, random loudness, and faint noise throughout."""
    parts: list[np.ndarray] = []
    for wave in waves:
        parts.append(np.zeros(int(rng.uniform(*PAUSE_SECONDS) * SAMPLE_RATE), dtype=np.float32))
        parts.append(wave * np.float32(rng.uniform(0.4, 1.0)))
    joined = np.concatenate(parts)
    return joined + rng.normal(0, 1e-3, len(joined)).astype(np.float32)


def detune(rng: np.random.Generator, wave: np.ndarray) -> np.ndarray:
    """The wave played a little faster or slower, as an instrument that is out of tune."""
    speed = 2 ** (rng.uniform(-DETUNE_CENTS, DETUNE_CENTS) / 1200)
    places = np.arange(int(len(wave) / speed)) * speed
    return np.interp(places, np.arange(len(wave)), wave).astype(np.float32)


def flac_bytes(wave: np.ndarray) -> bytes:
    """16-bit, quick rather than small."""
    out = io.BytesIO()
    soundfile.write(out, np.clip(wave, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=0)
    return out.getvalue()


def mp4_bytes(frames: list[Image.Image], wave: np.ndarray) -> bytes:
    """H.264 picture and AAC sound in an MP4; the sound is padded to the length of the picture."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FRAMES_A_SECOND, options=X264_OPTIONS)
        video.width = video.height = TILE_PX
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # more threads cost more than they save on 4 small frames
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=AAC_OPTIONS)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = index, Fraction(1, FRAMES_A_SECOND)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        num_samples = max(len(wave), NUM_FRAMES * SAMPLE_RATE // FRAMES_A_SECOND)
        padded = np.zeros((1, num_samples), dtype=np.float32)
        padded[0, : len(wave)] = np.clip(wave, -1, 1)
        sound = av.AudioFrame.from_ndarray(padded, format="fltp", layout="mono")
        sound.sample_rate, sound.pts = SAMPLE_RATE, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode())
    return out.getvalue()
