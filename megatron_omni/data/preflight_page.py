"""The page of a preflight: one HTML file without scripts, everything drawn inside it.

Records come from anywhere: every text goes through ``text_of``, which escapes it and shows control and direction-changing
characters by their numbers, and the page's content security policy forbids scripts and loading of any kind.
"""

import base64
import html
import io
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_omni.batch import Modality
from megatron_omni.data.preflight import BadRecord, Example, Piece, Preflight, SourceReport
from megatron_omni.drawn import DrawnPicture

MAX_TILES = 16
MAX_CHUNKS = 4
MAX_PIECE_CHARACTERS = 1500
THUMBNAIL = 96
HISTOGRAM_BARS = 24
PLOT_POINTS = 400
CHANNELS = (("time", "#1f77b4"), ("height", "#d62728"), ("width", "#2ca02c"))

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1180px;padding:0 16px;color:#1c2330;background:#fff}
h1{font-size:22px}h2{margin-top:36px;border-bottom:2px solid #d8dee9;padding-bottom:4px}h3{font-size:13px;margin:18px 0 6px}
table{border-collapse:collapse;margin:8px 0}td,th{padding:3px 12px 3px 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right}.card{border:1px solid #d8dee9;border-radius:6px;padding:8px 14px;margin:12px 0}
.tokens{font-family:ui-monospace,monospace;font-size:12.5px;white-space:pre-wrap;overflow-wrap:anywhere;margin:8px 0}
.t{background:#eef1f6;border-radius:3px;padding:0 2px}.l{background:#b9efc2}.s{color:#8a4bb8;font-weight:600}
.m{background:#fde9b8;border-radius:3px;padding:0 4px;margin:0 1px}.good{color:#1a7f37}.bad{color:#b3261e;font-weight:600}
.media img{margin:2px;border:1px solid #c5ccd8}.note{color:#5b6577}.media figure{display:inline-block;margin:2px 8px 2px 0}
figcaption{font-size:11px;color:#5b6577}svg{background:#fafbfd;border:1px solid #e3e7ee}
"""


def text_of(value: object) -> str:
    """``value`` as HTML text: escaped, with invisible characters shown as their numbers."""
    shown = []
    for character in str(value):
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") and character not in "\n\t"
        shown.append(f"\\u{ord(character):04x}" if hidden else character)
    return html.escape("".join(shown), quote=True)


def page(preflight: Preflight, *, title: str) -> str:
    """The whole file."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>Preflight: {text_of(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Preflight of {text_of(title)}</h1>",
        _problems(preflight),
        _overview(preflight),
        *(_source(i, report) for i, report in enumerate(preflight.sources)),
        "</body></html>",
    ]
    return "\n".join(parts)


def _problems(preflight: Preflight) -> str:
    if not preflight.problems:
        return "<p class=good>Nothing stands out. Look at the samples all the same.</p>"
    return "<ul>" + "".join(f"<li class=bad>{text_of(problem)}</li>" for problem in preflight.problems) + "</ul>"


def _overview(preflight: Preflight) -> str:
    recipe, packing = preflight.recipe, preflight.packing
    unit = "packed sequences" if recipe.data.packing else "samples"
    name = "packing efficiency" if recipe.data.packing else "part of the computed tokens that are no padding"
    how = (
        f"all {packing.planned_steps:,} steps planned"
        if packing.is_whole
        else f"{packing.planned_steps:,} steps planned, some of each phase of the mixture"
    )
    lines = [
        f"<p>{recipe.train_iters:,} steps of {recipe.data.global_batch_size} {unit} of at most {recipe.data.seq_length:,} "
        f"tokens: {'' if packing.is_whole else 'about '}{preflight.total_samples:,.0f} samples. {name.capitalize()}: "
        f"<b>{packing.efficiency:.1%}</b> ({how}).</p>"
    ]
    if preflight.planned_skips:
        skips = ", ".join(f"{text_of(reason)}: {count}" for reason, count in preflight.planned_skips.items())
        lines.append(f"<p class=bad>Records that these plans skip: {skips}</p>")
    head = "<tr><th>source<th class=n>records<th class=n>share<th class=n>epochs<th class=n>mean tokens<th class=n>bad</tr>"
    body = "".join(
        f"<tr><td><a href='#source{i}'>{text_of(r.name)}</a><td class=n>{r.rows:,}<td class=n>{r.share:.1%}"
        f"<td class=n>{r.epochs:.2f}<td class=n>{np.mean(r.lengths) if r.lengths else 0:.0f}"
        f"<td class=n>{len(r.bad)} of {r.tried}</tr>"
        for i, r in enumerate(preflight.sources)
    )
    legend = (
        "<p class=note>In the samples: <span class='t l'>learned</span> <span class=t>read only</span> "
        "<span class='t s'>special token</span> <span class=m>placeholders of media</span>. Tiles and spectrograms are "
        "drawn from the tensors that the encoders get.</p>"
    )
    return "\n".join([*lines, f"<table>{head}{body}</table>", legend])


def _source(number: int, report: SourceReport) -> str:
    drawn: set[bytes] = set()  # positions that this source has shown already
    parts = [
        f"<h2 id=source{number}>{text_of(report.name)}</h2><p class=note>{text_of(report.path)}</p>",
        f"<h3>Tokens of {len(report.lengths)} planned samples</h3>{histogram(report.lengths)}"
        if report.lengths
        else "",
        *(_example(example, drawn) for example in report.examples),
        _bad(report.bad),
    ]
    return "\n".join(parts)


def _bad(records: Sequence[BadRecord]) -> str:
    if not records:
        return ""
    rows = "".join(f"<tr><td class=bad>{text_of(r.reason)}<td>{text_of(r.message)}</tr>" for r in records)
    return f"<h3>Records that a run skips</h3><table>{rows}</table>"


def _example(example: Example, drawn: set[bytes]) -> str:
    sample = example.sample
    tiles = 0 if sample.tiles is None else len(sample.tiles)
    chunks = 0 if sample.chunks is None else len(sample.chunks)
    counts = [f"{sample.length} tokens, {example.learned_tokens} learned"]
    if tiles or example.visual_placeholders:
        counts.append(f"{tiles} tiles give {example.visual_rows} rows for {example.visual_placeholders} placeholders")
    if chunks or example.audio_placeholders:
        counts.append(f"{chunks} chunks give {example.audio_rows} rows for {example.audio_placeholders} placeholders")
    verdict = "<span class=good>agree</span>" if example.agrees else "<span class=bad>DISAGREE</span>"
    media = _tiles(sample.tiles) + _chunks(sample.chunks) + "".join(map(_drawn, sample.drawn))
    key = sample.position_ids.numpy().tobytes()
    where = "<div class=note>3D positions: as above</div>" if key in drawn else positions(sample.position_ids)
    drawn.add(key)
    return (
        f"<div class=card><h3>{text_of(example.where)}</h3><div>{'; '.join(counts)}"
        f"{': ' + verdict if tiles or chunks or not example.agrees else ''}</div><div class=media>{media}</div>"
        f"<div class=tokens>{''.join(map(_piece, example.pieces))}</div>{where}</div>"
    )


def _piece(piece: Piece) -> str:
    if piece.modality != Modality.TEXT:
        return f"<span class=m>{text_of(piece.text)} x {piece.count}</span>"
    text = piece.text[:MAX_PIECE_CHARACTERS]
    rest = f" [{len(piece.text) - len(text)} more characters]" if len(text) < len(piece.text) else ""
    style = "t" + " l" * piece.learned + " s" * piece.special
    return f"<span class='{style}'>{text_of(text)}</span>{rest}"


# ------------------------------------------------------------------------------------------------ media


def _tiles(tiles: Tensor | None) -> str:
    if tiles is None:
        return ""
    shown = "".join(_image(_picture(tile), "tile") for tile in tiles[:MAX_TILES])
    return shown + (f"<span class=note>{len(tiles) - MAX_TILES} more tiles</span>" if len(tiles) > MAX_TILES else "")


def _picture(tile: Tensor) -> Image.Image:
    """[3, p, p] uint8."""
    return Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()).resize(
        (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC
    )


def _drawn(picture: DrawnPicture) -> str:
    """A picture that an answer draws, with its source; of latents the size alone."""
    shown = ""
    for name, value in (("source", picture.source), ("to draw", picture.target)):
        if value is None:
            continue
        pixels = value.dtype == torch.uint8
        size = f"{value.shape[2]} x {value.shape[1]}{'' if pixels else ' latents'}"
        image = _image(_picture(value), "picture") if pixels else ""
        shown += f"<figure>{image}<figcaption>{name} ({text_of(picture.task)}), {size}</figcaption></figure>"
    return shown


def _chunks(chunks: Tensor | None) -> str:
    if chunks is None:
        return ""
    shown = "".join(
        f"<figure>{_image(_spectrogram(chunk), 'spectrogram')}<figcaption>chunk {i}: {chunk.shape[0]} mel bins, "
        f"{chunk.shape[1] / 100:g} s</figcaption></figure>"
        for i, chunk in enumerate(chunks[:MAX_CHUNKS])
    )
    more = len(chunks) - MAX_CHUNKS
    return shown + (f"<span class=note>{more} more chunks</span>" if more > 0 else "")


def _spectrogram(chunk: Tensor) -> Image.Image:
    """[mel bins, frames] log-mel, low notes below, dark to bright."""
    values = chunk.numpy()[::-1]
    low, high = float(values.min()), float(values.max())
    level = (values - low) / max(high - low, 1e-6)
    colours = np.stack([level, level**2, 0.35 + 0.5 * level - 0.85 * level**3], axis=-1).clip(0, 1)
    picture = Image.fromarray((colours * 255).astype(np.uint8))
    return picture.resize((min(360, max(120, chunk.shape[1])), THUMBNAIL), Image.Resampling.BILINEAR)


def _image(picture: Image.Image, name: str) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return f'<img alt="{name}" width={picture.width} height={picture.height} src="data:image/png;base64,{data}">'


# ------------------------------------------------------------------------------------------------ drawings


def positions(position_ids: Tensor) -> str:
    """The three channels of the positions [3, L] over the tokens; a line of words where they are those of plain text."""
    length = position_ids.shape[1]
    if bool((position_ids == torch.arange(length)).all()):
        return f"<div class=note>3D positions: 0 to {length - 1}, the three channels equal</div>"
    largest = max(1, int(position_ids.max()))
    width, height = 560, 110
    step = max(1, length // PLOT_POINTS)
    lines = []
    for channel, (name, colour) in enumerate(CHANNELS):
        values = position_ids[channel].tolist()[::step]
        points = " ".join(
            f"{8 + i * step * (width - 16) / max(length - 1, 1):.1f},{height - 8 - v * (height - 16) / largest:.1f}"
            for i, v in enumerate(values)
        )
        dash = ("", " stroke-dasharray='5 3'", " stroke-dasharray='2 3'")[channel]
        lines.append(
            f"<polyline fill=none stroke='{colour}' stroke-width=1.6{dash} points='{points}'><title>{name}</title></polyline>"
        )
    key = " ".join(f"<span style='color:{colour}'>{name}</span>" for name, colour in CHANNELS)
    return (
        f"<div class=note>3D positions, 0 to {largest}, over {length} tokens: {key}</div>"
        f"<svg width={width} height={height} role=img>{''.join(lines)}{_axes(width, height, 'token', largest)}</svg>"
    )


def _axes(width: int, height: int, across: str, top: int) -> str:
    """What goes across, and the value at the top of the left side."""
    style = "font-size=10 fill='#5b6577'"
    return (
        f"<text x=2 y=10 {style}>{top}</text><text x={width - 4} y={height - 2} text-anchor=end {style}>{across}</text>"
    )


def histogram(lengths: Iterable[int]) -> str:
    """Bars of equal width from the shortest to the longest."""
    values = np.asarray(list(lengths))
    low, high = int(values.min()), int(values.max())
    bars = min(HISTOGRAM_BARS, high - low + 1)
    counts, _ = np.histogram(values, bins=bars, range=(low, high + 1))
    width, height = 560, 90
    bar, tallest = width / bars, max(1, int(counts.max()))
    drawn = "".join(
        f"<rect x={i * bar + 1:.1f} y={height - count * (height - 6) / tallest:.1f} width={bar - 2:.1f} "
        f"height={count * (height - 6) / tallest:.1f} fill='#5b8def'><title>{count}</title></rect>"
        for i, count in enumerate(counts.tolist())
    )
    return (
        f"<svg width={width} height={height} role=img>{drawn}{_axes(width, height, 'tokens of a sample', tallest)}</svg>"
        f"<div class=note>{low} to {high} tokens, mean {values.mean():.0f}, median {np.median(values):.0f}</div>"
    )
