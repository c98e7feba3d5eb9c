"""`fewstep inspect`: a page about a data set, with a contact sheet."""

from __future__ import annotations

import base64
import io
import json
import logging
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fewstep.data.inspection import Inspection, Shown, inspect_shards
from fewstep.data.samples import NO_RULES
from fewstep.data.shards import read_index
from fewstep.evaluate.page import PAGE_STYLE
from fewstep.evaluate.sheet import to_pil
from fewstep.recipe import Recipe
from fewstep.storage import Storage, StorageSettings, open_storage

logger = logging.getLogger("fewstep.inspect")

_CELL, _GAP, _LINES, _COLUMNS = 128, 12, 3, 8


def inspect_data(
    uri: str, out: Path, *, recipe: Recipe | None = None, max_samples: int = 10_000, num_shown: int = 48, seed: int = 0
) -> list[str]:
    """Look at shards and write inspect.json, inspect.html and contact.png; return lines for people.

    Args:
        uri: folder of webdataset shards, s3:// or local.
        out: folder for the files.
        recipe: its store is used, and its filters and captions applied.
        max_samples: samples after which no further shard is begun.
        num_shown: pictures of the contact sheet.
        seed: of what is drawn.

    Raises:
        DataError: there are no shards, or not one sample can be used.
        StorageError: the store cannot be reached.
    """
    if uri.startswith("s3://"):
        with open_storage(recipe.storage if recipe else StorageSettings()) as storage:
            found = _inspect(uri, storage, recipe, max_samples, num_shown, seed)
    else:
        found = _inspect(uri, Storage(StorageSettings()), recipe, max_samples, num_shown, seed)
    sheet = contact_sheet(found.shown)
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspect.json").write_text(json.dumps({"uri": uri, **found.facts}, indent=1) + "\n")
    sheet.save(out / "contact.png")
    (out / "inspect.html").write_text(page(uri, found.facts, sheet), encoding="utf-8")
    return [*summary(found.facts), f"Look at: {out / 'inspect.html'} and {out / 'contact.png'}"]


def _inspect(
    uri: str, storage: Storage, recipe: Recipe | None, max_samples: int, num_shown: int, seed: int
) -> Inspection:
    index = read_index(uri, storage=storage)
    rules = recipe.sample_rules if recipe else NO_RULES
    return inspect_shards(
        index, storage, rules=rules, max_samples=max_samples, num_shown=num_shown, cell=_CELL, seed=seed
    )


def summary(facts: Mapping[str, Any]) -> list[str]:
    """Return the most important facts, a line each."""
    known = "not counted" if facts["samples"] is None else f"{facts['samples']:,} samples"
    lines = [
        f"{facts['shards']:,} shards, {known}, {facts['bytes'] / 1e9:,.3g} GB; digest {facts['digest'][:16]}",
        f"looked at {facts['seen']:,} samples in {facts['inspected_shards']:,} shards: {facts['usable']:,} can be used",
        "pictures: " + ", ".join(f"{count:,} {kind}" for kind, count in facts["kinds"].items())
        + f"; shorter side {_spread(facts['shorter_side'])} px; {_spread(facts['picture_bytes'], 1e-3)} KB",
        f"captions: {_spread(facts['caption_words'])} words; {facts['captions_seen_before']:,} seen before",
    ]  # fmt: skip
    for what in ("skipped", "filtered"):
        if facts[what]:
            reasons = ", ".join(f"{count:,} × {reason}" for reason, count in sorted(facts[what].items()))
            lines.append(f"{what}: {reasons}")
    if facts["keys_seen_before"]:
        lines.append(f"keys: {facts['keys_seen_before']:,} were seen before, in another shard")
    return lines


def _spread(percentiles: Mapping[str, float], scale: float = 1.0) -> str:
    least, low, middle, high, most = (percentiles[name] * scale for name in ("0", "5", "50", "95", "100"))
    return f"{middle:.4g} ({low:.4g} … {high:.4g}; all {least:.4g} … {most:.4g})"


def contact_sheet(shown: Sequence[Shown]) -> Image.Image:
    """Return the pictures in rows, each with its size and the begin of its caption below."""
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    font = ImageFont.load_default(11)
    text_px = (_LINES + 1) * 14
    width, height = columns * (_CELL + _GAP) + _GAP, rows * (_CELL + text_px + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(shown):
        left = _GAP + number % columns * (_CELL + _GAP)
        top = _GAP + number // columns * (_CELL + text_px + _GAP)
        draw.rectangle((left - 1, top - 1, left + _CELL, top + _CELL), outline="#e4e7ec")
        sheet.paste(to_pil(sample.pixels, size_px=_CELL), (left, top))
        draw.text((left, top + _CELL + 2), sample.size, fill="#667085", font=font)
        wrapped = textwrap.wrap(sample.caption, 22, max_lines=_LINES, placeholder=" …")
        draw.multiline_text((left, top + _CELL + 15), "\n".join(wrapped), fill="#1c2330", font=font, spacing=2)
    return sheet


def page(uri: str, facts: Mapping[str, Any], sheet: Image.Image) -> str:
    """Return the page: one file, nothing loaded from elsewhere."""
    file = io.BytesIO()
    sheet.save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    sections = [
        ("At a glance", "".join(f"<p>{escape(line)}</p>" for line in summary(facts))),
        ("Pictures", f"<img class='grid' alt='Contact sheet' src='data:image/png;base64,{picture}'>"),
        ("Width over height", _bars(facts["aspects"])),
        ("Sizes and captions", _table([
            (name.replace("_", " "), facts[name])
            for name in ("width", "height", "shorter_side", "picture_bytes", "caption_words", "caption_characters")
        ])),
        ("Metadata", _fields(facts["fields"])),
    ]  # fmt: skip
    if facts["worst_shards"]:
        sections.append(("Shards with samples that cannot be used", _bars(facts["worst_shards"])))
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(uri)}</title><style>{PAGE_STYLE}"
        ".bar{background:#12805c;height:12px;border-radius:3px;min-width:1px}</style>"
        f"<main><h1>{escape(uri)}</h1><p class='soft'>fewstep inspect</p>{body}</main></html>\n"
    )


def _bars(counts: Mapping[str, int]) -> str:
    most = max(counts.values()) or 1
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{count:,}</td>"
        f"<td style='width:60%'><div class='bar' style='width:{100 * count / most:.1f}%'></div></td></tr>"
        for name, count in counts.items()
    )
    return f"<div class='wide'><table>{rows}</table></div>"


def _table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    names = list(rows[0][1])
    head = "".join(f"<th>{'least' if name == '0' else 'most' if name == '100' else name + ' %'}</th>" for name in names)
    body = "".join(
        f"<tr><td>{escape(what)}</td>{''.join(f'<td>{values[name]:,.6g}</td>' for name in names)}</tr>"
        for what, values in rows
    )
    return f"<div class='wide'><table><tr><th></th>{head}</tr>{body}</table></div>"


def _fields(fields: Mapping[str, Mapping[str, Any]]) -> str:
    if not fields:
        return "<p>The samples have no .json.</p>"
    rows = []
    for name, facts in fields.items():
        if "percentiles" in facts:
            said = _spread(facts["percentiles"])
        else:
            said = " · ".join(f"{value} ({count:,})" for value, count in facts["values"].items())
        rows.append(f"<tr><td>{escape(name)}</td><td>{facts['share']:.1%}</td><td>{escape(said)}</td></tr>")
    head = "<tr><th>field</th><th>given</th><th>values</th></tr>"
    return f"<div class='wide'><table>{head}{''.join(rows)}</table></div>"
