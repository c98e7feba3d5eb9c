"""Pictures as files, with where they came from inside."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fewstep.serve.wire import OutputFormat

_EXIF_IMAGE_DESCRIPTION = 0x010E
_EXIF_SOFTWARE = 0x0131


@dataclass(frozen=True)
class Provenance:
    """How a picture was made; written into its file, so that it can be made again and is known to be generated.

    Attributes:
        prompt, seed, num_inference_steps, guidance_scale, model: of every picture.
        details: what else was asked for, by name.
    """

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    model: str
    details: Mapping[str, str] = field(default_factory=dict)

    def as_text(self) -> dict[str, str]:
        """Return the metadata, key to text; nothing in it depends on when or where the picture was made."""
        return {
            "Title": "AI-generated",
            "Software": "fewstep",
            "prompt": _printable(self.prompt),
            "seed": str(self.seed),
            "num_inference_steps": str(self.num_inference_steps),
            "guidance_scale": format(self.guidance_scale, "g"),
            "model": self.model,
            **{name: _printable(value) for name, value in self.details.items()},
        }


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c == "\n")


def encode_image(
    image: Image.Image, provenance: Provenance, *, output_format: OutputFormat = "png", quality: int = 100
) -> bytes:
    """Return the picture as a PNG, WebP or JPEG file with its provenance inside (tEXt in PNG, EXIF in the others).

    The bytes depend on the arguments alone: the same picture is the same file.

    Args:
        image: RGB picture.
        provenance: how it was made.
        output_format: kind of file.
        quality: 0 to 100 for webp and jpeg; png is lossless and does not take it.
    """
    buffer = io.BytesIO()
    text = provenance.as_text()
    if output_format == "png":
        info = PngInfo()
        for key, value in text.items():
            info.add_text(key, value)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[_EXIF_SOFTWARE] = "fewstep"
        # EXIF text is ASCII by its standard; escapes keep other prompts readable.
        lines = "; ".join(f"{key}: {value}" for key, value in text.items() if key != "Software")
        exif[_EXIF_IMAGE_DESCRIPTION] = lines.encode("ascii", "backslashreplace").decode("ascii")
        image.save(buffer, output_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()
