"""Photo files with all that should survive restoration: bits, transparency, colour profile, resolution, EXIF."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from mambavision.engine.files import atomic_path
from mambavision.engine.photos import DatasetError, imread_unchanged

_JPEG = dict(format="JPEG", quality=95, subsampling=0)
_TIFF = dict(format="TIFF", compression="tiff_deflate")
_ENCODERS = {  # of Pillow; all but JPEG lose nothing
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".png": dict(format="PNG"),
    ".bmp": dict(format="BMP"),
    ".webp": dict(format="WEBP", lossless=True),
    ".tif": _TIFF,
    ".tiff": _TIFF,
}
WRITABLE_SUFFIXES = tuple(_ENCODERS)
_LONGEST = {"JPEG": 65535, "WEBP": 16383}  # pixels of a side
_ORIENTATION = 0x0112  # EXIF tag
_CONVERTED = {"1": "L", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB", "PA": "RGBA", "RGBa": "RGBA"}


@dataclass(frozen=True)
class PhotoFile:
    """A photo as it is displayed, upright.

    Attributes:
        pixels: uint8 or uint16 (H, W, C): C = 1 gray or 3 RGB.
        alpha: Opacity, (H, W) of the same type, where the photo has one.
        icc: ICC colour profile, where it has one that fits its channels.
        exif: EXIF block without orientation, where it has one.
        dpi: Resolution, where it states one.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None

    def restored(self, pixels: np.ndarray) -> PhotoFile:
        """The photo with other pixels; its transparency is enlarged to their size."""
        alpha = self.alpha
        if alpha is not None and alpha.shape != pixels.shape[:2]:
            alpha = cv2.resize(alpha, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        return replace(self, pixels=pixels, alpha=alpha)


def read_photo_file(path: str | os.PathLike) -> PhotoFile:
    """Read a photo of 8 or 16 bits; see :class:`PhotoFile`.

    Raises:
        DatasetError: If it is missing, empty, truncated, no photo, or has other than 1, 3 or 4 channels.
    """
    try:
        pixels = imread_unchanged(path, orientation="stored")
    except MemoryError:
        raise DatasetError(f"{path}: too large to be read into memory") from None
    mode, icc, exif, dpi, orientation = _metadata(path)
    is_tiff = Path(path).suffix.lower() in (".tif", ".tiff")
    if is_tiff and mode in ("LA", "RGBA") and pixels.dtype == np.uint8:  # OpenCV multiplies these by alpha
        with Image.open(path) as image:
            return replace(from_pil(image), dpi=dpi)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    channels = pixels.shape[2]
    if channels not in (1, 3, 4):
        raise DatasetError(f"{path}: {channels} channels; a photo has 1 (gray), 3 (colour) or 4 (colour and alpha)")
    if not is_tiff:  # of a TIFF, OpenCV has done it
        pixels = _upright(pixels, orientation)
    alpha = np.ascontiguousarray(pixels[..., 3]) if channels == 4 and mode != "CMYK" else None
    colour = pixels[..., :1] if channels == 1 or mode == "LA" else pixels[..., 2::-1]
    return PhotoFile(np.ascontiguousarray(colour), alpha, _fitting_icc(icc, colour.shape[2]), exif, dpi)


def read_mask(path: str | os.PathLike, photo: PhotoFile) -> np.ndarray:
    """Read the mask of a photo, white where it is to be filled: bool (H, W), true from half of white on.

    Raises:
        DatasetError: As :func:`read_photo_file`, and if it is not of the photo's size.
    """
    pixels = read_photo_file(path).pixels
    (height, width), (expected, across) = pixels.shape[:2], photo.pixels.shape[:2]
    if (height, width) != (expected, across):
        raise DatasetError(f"{path}: a mask of {width}x{height} pixels for a photo of {across}x{expected}")
    return pixels.mean(2) > np.iinfo(pixels.dtype).max / 2


def write_photo_file(path: str | os.PathLike, photo: PhotoFile) -> None:
    """Write a photo in the format of the path's suffix, whole or not at all; makes the folder.

    JPEG is written at quality 95 without chroma subsampling, all else without loss. The colour profile is written but
    to BMP and 16-bit TIFF; EXIF and resolution to 8-bit files.

    Raises:
        DatasetError: If the format cannot hold the photo; see :func:`check_writable`.
        OSError: If the disk is full, or the file cannot be written.
    """
    path = Path(path)
    check_writable(path, photo)
    wide_or_bmp = photo.pixels.dtype == np.uint16 or (path.suffix.lower() == ".bmp" and photo.alpha is not None)
    data = _encode_by_opencv(path, photo) if wide_or_bmp else _encode_by_pillow(path, photo)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror or error})") from error


def check_writable(path: str | os.PathLike, photo: PhotoFile, scale: int = 1) -> None:
    """Check that a file format can hold a photo enlarged by ``scale``.

    Raises:
        DatasetError: If it is not one that can be written, or has no place for the bits, the transparency or the size.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _ENCODERS:
        raise DatasetError(f"{path}: photos are written as {', '.join(WRITABLE_SUFFIXES)}")
    encoder = _ENCODERS[suffix]["format"]
    if photo.pixels.dtype == np.uint16 and encoder not in ("PNG", "TIFF"):
        raise DatasetError(f"{path}: the photo has 16 bits a channel, {encoder} holds 8; name a .png or .tif file")
    if photo.alpha is not None and encoder == "JPEG":
        raise DatasetError(f"{path}: the photo is transparent, JPEG holds no alpha; name a .png file")
    side, longest = max(photo.pixels.shape[:2]) * scale, _LONGEST.get(encoder)
    if longest and side > longest:
        raise DatasetError(f"{path}: {encoder} holds at most {longest} pixels a side, not {side}; name a .png file")


def from_array(array: np.ndarray) -> PhotoFile:
    """Take over an array: uint8 or uint16, (H, W) or (H, W, 1) gray, (H, W, 3) RGB; with alpha (H, W, 2 or 4).

    Raises:
        ValueError: If it is of another shape or type, or empty.
    """
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"a picture is uint8 or uint16, (H, W) or (H, W, 1 to 4) RGB; got {array.dtype} {array.shape}")
    array = array[..., None] if array.ndim == 2 else array
    channels = array.shape[2]
    if channels > 4:
        raise ValueError(f"{channels} channels; a picture has 1 (gray), 3 (RGB), or 2 or 4 with alpha")
    if channels in (2, 4):
        return PhotoFile(np.ascontiguousarray(array[..., :-1]), np.ascontiguousarray(array[..., -1]))
    return PhotoFile(np.ascontiguousarray(array))


def to_array(photo: PhotoFile) -> np.ndarray:
    """(H, W) gray, (H, W, 3) RGB, or with alpha (H, W, 2 or 4)."""
    if photo.alpha is not None:
        return np.concatenate([photo.pixels, photo.alpha[..., None]], axis=2)
    return photo.pixels[..., 0] if photo.pixels.shape[2] == 1 else photo.pixels


def from_pil(image: Image.Image) -> PhotoFile:
    """Take over a Pillow image; palettes and other colour spaces become RGB, EXIF orientation is applied.

    Raises:
        ValueError: If it has floats or 32 bits.
    """
    image = ImageOps.exif_transpose(image)
    icc = image.info.get("icc_profile")
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in _CONVERTED:
        image = image.convert(_CONVERTED[image.mode])
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
        raise ValueError(f"a Pillow image of mode {image.mode} cannot be restored; convert it to RGB, L or I;16")
    photo = from_array(np.array(image))
    return replace(photo, icc=_fitting_icc(icc, photo.pixels.shape[2]))


def to_pil(photo: PhotoFile) -> Image.Image:
    """Pillow image of mode L, LA, RGB, RGBA or (16-bit gray) I;16, with the colour profile in ``info``."""
    image = Image.fromarray(to_array(photo))
    if photo.icc:
        image.info["icc_profile"] = photo.icc
    return image


def side_by_side(before: PhotoFile, after: PhotoFile) -> PhotoFile:
    """A picture of both next to each other, the smaller one enlarged, on white where it is transparent."""
    height, width, channels = after.pixels.shape
    halves = [_on_white(before), _on_white(after)]
    halves[0] = cv2.resize(halves[0], (width, height), interpolation=cv2.INTER_CUBIC).reshape(after.pixels.shape)
    line = np.full((height, max(2, width // 200), channels), np.iinfo(after.pixels.dtype).max, after.pixels.dtype)
    return PhotoFile(np.concatenate([halves[0], line, halves[1]], axis=1), icc=after.icc)


def _on_white(photo: PhotoFile) -> np.ndarray:
    if photo.alpha is None:
        return photo.pixels
    full = np.iinfo(photo.pixels.dtype).max
    opacity = photo.alpha[..., None].astype(np.float32) / full
    return (photo.pixels * opacity + full * (1 - opacity)).round().astype(photo.pixels.dtype)


def _metadata(path: str | os.PathLike) -> tuple[str, bytes | None, bytes | None, tuple[float, float] | None, int]:
    """Mode, colour profile, EXIF without orientation, resolution, and orientation, from the file's head."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # nothing is decoded here
    try:
        with Image.open(path) as image:
            exif = image.getexif()
            orientation = exif.pop(_ORIENTATION, 1)
            kept = exif.tobytes() if exif and "exif" in image.info else None  # of a TIFF it would be its layout
            dpi = image.info.get("dpi")
            dpi = tuple(map(float, dpi)) if dpi and all(dpi) else None
            return image.mode, image.info.get("icc_profile"), kept, dpi, orientation
    except Exception:  # Pillow knows fewer kinds of file than OpenCV, and damaged EXIF fails anywhere in its parser
        return "", None, None, None, 1
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _fitting_icc(icc: bytes | None, channels: int) -> bytes | None:
    """The profile, if it is of gray or RGB as the pixels are; a converted CMYK photo's is not."""
    return icc if icc and icc[16:20] == (b"GRAY" if channels == 1 else b"RGB ") else None


def _encode_by_pillow(path: Path, photo: PhotoFile) -> bytes:
    options = dict(_ENCODERS[path.suffix.lower()])
    if photo.exif and options["format"] in ("JPEG", "PNG", "WEBP"):
        options["exif"] = photo.exif
    if photo.dpi:
        options["dpi"] = photo.dpi
    if photo.icc:
        options["icc_profile"] = photo.icc
    buffer = io.BytesIO()
    Image.fromarray(to_array(photo)).save(buffer, **options)
    return buffer.getbuffer()


def _encode_by_opencv(path: Path, photo: PhotoFile) -> bytes:
    array = to_array(photo)
    if photo.pixels.shape[2] == 3:
        array = array[..., [2, 1, 0, 3][: array.shape[2]]]
    elif photo.alpha is not None:  # OpenCV writes no gray with alpha
        array = array[..., [0, 0, 0, 1]]
    if photo.icc and path.suffix.lower() == ".png" and hasattr(cv2, "imencodeWithMetadata"):  # OpenCV >= 4.12
        icc = [np.frombuffer(photo.icc, np.uint8)]
        ok, data = cv2.imencodeWithMetadata(".png", array, [cv2.IMAGE_METADATA_ICCP], icc)
    else:
        ok, data = cv2.imencode(path.suffix.lower(), array)
    if not ok:
        raise DatasetError(f"{path}: OpenCV cannot write {array.dtype} pixels of shape {array.shape} there")
    return data.tobytes()
