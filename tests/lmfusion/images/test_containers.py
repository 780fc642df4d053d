"""Image files: damaged or huge parts other than the pixels neither make an image unreadable nor take time."""

import io
import itertools
import struct
import time
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from lmfusion.images.containers import MAX_SCANS, TURNS, CostlyImageError, orientation, strip_metadata
from lmfusion.images.preprocessing import decode_image, load_image, read_image_size
from tests.lmfusion.data.storage.stored import chunk, encoded, picture


def pixels(data):
    return np.asarray(decode_image(data, "x").convert("RGB"))


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# Parts of files


def png_with(*added, behind=()):
    """A PNG with chunks before its pixels, and behind them."""
    data = encoded("PNG")
    at, end = data.index(b"IDAT") - 4, len(data) - 12
    return data[:at] + b"".join(added) + data[at:end] + b"".join(behind) + data[end:]


def segment(kind, content):
    return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(*added, behind=b"", **options):
    data = encoded("JPEG", **options)
    return data[:2] + b"".join(added) + data[2:] + behind


def webp_with(*added, cut=0, flags=0, **options):
    """A WEBP with chunks (kind, bytes) behind its pixels, the last of them `cut` bytes too short."""
    data = encoded("WEBP", **options)
    [first] = [data[12:]] if data[12:16] != b"VP8X" else [data[30:]]
    header = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes([flags, 0, 0, 0])
        + (23).to_bytes(3, "little")
        + (19).to_bytes(3, "little")
    )
    body = header + first
    for kind, content in added:
        body += kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    whole = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return whole[: len(whole) - cut]


def exif(value=6, kind=3, order="<", count=1, tag=0x0112):
    """EXIF of one entry."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    packed = value if isinstance(value, bytes) else struct.pack(f"{order}{ {1: 'B', 3: 'H', 4: 'I'}[kind] }", value)
    return head + struct.pack(f"{order}HHHI", 1, tag, kind, count) + packed.ljust(4, b"\0") + bytes(4)


BOMB = zlib.compress(bytes(40_000_000))
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
GARBAGE = [b"", b"garbage", b"II*\0", b"not a tiff", b"MM\0*\xff\xff\xff\xff", bytes(70), b"\xff" * 70]
HARMLESS_PNG = {
    **{f"exif {content[:8]!r}": png_with(chunk(b"eXIf", content)) for content in GARBAGE},
    "exif behind": png_with(behind=[chunk(b"eXIf", b"garbage")]),
    "large zTXt": png_with(chunk(b"zTXt", b"x\0\0" + zlib.compress(np.random.default_rng(0).bytes(2**21)))),
    "zTXt bomb": png_with(chunk(b"zTXt", b"x\0\0" + BOMB)),
    "many bombs": png_with(*[chunk(b"zTXt", b"x\0\0" + BOMB)] * 30),
    "iTXt bomb": png_with(chunk(b"iTXt", b"x\0\1\0\0\0" + BOMB)),
    "XMP bomb": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "profile bomb": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB)),
    "iCCP bomb": png_with(chunk(b"iCCP", b"x\0\0" + BOMB)),
    "huge tEXt": png_with(chunk(b"tEXt", b"x\0" + b"y" * 5_000_000)),
    "broken iCCP": png_with(chunk(b"iCCP", b"")),
    "iCCP of another method": png_with(chunk(b"iCCP", b"x\0\7abc")),
    "broken zTXt": png_with(chunk(b"zTXt", b"x\0\0not packed")),
    "empty texts": png_with(*(chunk(kind, b"") for kind in (b"tEXt", b"zTXt", b"iTXt"))),
    "odd texts": png_with(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0"), chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz")
    ),
    "short pHYs": png_with(chunk(b"pHYs", b"\0")),
    "short gAMA": png_with(chunk(b"gAMA", b"")),
    "short cHRM": png_with(chunk(b"cHRM", b"1")),
    "short sRGB": png_with(chunk(b"sRGB", b"")),
    "acTL of nothing": png_with(chunk(b"acTL", b"")),
    "fcTL of nothing": png_with(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", b"")),
    "unknown": png_with(chunk(b"abCd", b"what is it")),
    "wrong checksum of text": png_with(chunk(b"tEXt", b"x\0y", 1)),
    "wrong checksum of exif": png_with(chunk(b"eXIf", exif(), 1)),
    "wrong checksum of profile": png_with(chunk(b"iCCP", b"x\0\0", 1)),
    "wrong checksum behind": png_with(behind=[chunk(b"tIME", b"1234567", 1)]),
    "more behind the end": png_with() + b"of a film" * 9,
}
HARMLESS_JPEG = {
    **{f"exif {content[:8]!r}": jpeg_with(segment(0xE1, b"Exif\0\0" + content)) for content in GARBAGE},
    "much exif": jpeg_with(*[segment(0xE1, b"Exif\0\0" + b"MM\0*" + b"\xff" * 65_000)] * 40),
    "broken profile": jpeg_with(segment(0xE2, b"ICC_PROFILE\0" + b"\xff\xff" + b"not a profile")),
    "lacking profile": jpeg_with(segment(0xE2, b"ICC_PROFILE\0\2\3abc"), segment(0xE2, b"ICC_PROFILE\0")),
    "broken MPF": jpeg_with(segment(0xE2, b"MPF\0" + b"II*\0\xff\xff\xff\xff")),
    "MPF of three": jpeg_with(segment(0xE2, b"MPF\0" + exif(value=3, tag=0xB001, kind=4))),
    "broken XMP": jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\xfe<x")),
    "broken Photoshop": jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + b"\xff" * 9)),
    "every application": jpeg_with(*(segment(kind, b"\xff\xd9\xff\xda") for kind in range(0xE1, 0xF0) if kind != 0xEE)),
    "comment": jpeg_with(segment(0xFE, b"\xff\xda" * 900)),
    "thumbnail": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(1) + encoded("JPEG", picture(5), progressive=True) * 12)),
    "short JFIF": jpeg_with(segment(0xE0, b"JFIF\0")),
    "filling": jpeg_with(b"\xff\xff\xff"),
    "more behind the end": jpeg_with(behind=b"garbage \xff\xda of a film" * 500),
    "another picture behind": jpeg_with(behind=encoded("JPEG", picture(9)) * 200),
}
HARMLESS_WEBP = {
    **{f"exif {content[:8]!r}": webp_with((b"EXIF", content), flags=8) for content in GARBAGE},
    "exif cut off": webp_with((b"EXIF", bytes(500)), cut=333, flags=8),
    "exif left out": webp_with((b"EXIF", bytes(500)), cut=508, flags=8),
    "head of exif cut off": webp_with((b"EXIF", bytes(500)), cut=503, flags=8),
    "xmp cut off": webp_with((b"EXIF", exif(1)), (b"XMP ", b"<x" * 100), cut=7, flags=12),
    "broken XMP": webp_with((b"XMP ", b"\xff\xfe"), flags=4),
    "flags of what is not there": webp_with(flags=0x2C),
    "broken profile": webp_with((b"ICCP", b"no profile"), flags=0x20),
    "unknown": webp_with((b"abcd", b"what is it")),
    "more behind the end": webp_with() + b"of a film" * 9,
}


@pytest.mark.parametrize("name", HARMLESS_PNG)
def test_png_files_are_their_pixels(name):
    assert np.array_equal(pixels(HARMLESS_PNG[name]), by_pillow(encoded("PNG")))


@pytest.mark.parametrize("name", HARMLESS_JPEG)
def test_jpeg_files_are_their_pixels(name):
    assert np.array_equal(pixels(HARMLESS_JPEG[name]), by_pillow(encoded("JPEG")))


@pytest.mark.parametrize("name", HARMLESS_WEBP)
def test_webp_files_are_their_pixels(name):
    assert np.array_equal(pixels(HARMLESS_WEBP[name]), by_pillow(encoded("WEBP")))


def test_ordinary_files_of_all_kinds_are_what_pillow_reads():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image, grey = picture(), picture(1).convert("L")
    for kind, options in itertools.product(("JPEG", "PNG", "WEBP"), ({}, {"icc_profile": profile}, {"exif": exif(1)})):
        for source in (image, grey, image.convert("CMYK")):
            if source.mode != "CMYK" or kind == "JPEG":
                data = encoded(kind, source, **options)
                assert np.array_equal(pixels(data), by_pillow(data)), (kind, options, source.mode)
    for options in ({"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}, {"keep_rgb": True}):
        data = encoded("JPEG", **options)
        assert np.array_equal(pixels(data), by_pillow(data))


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"IEND", b"FOOT", b"foot", b"\0\0\0\0", b"tRNs"])
def test_damage_to_what_the_pixels_need_stays_damage(kind):
    with pytest.raises(ValueError, match="x is damaged or truncated"):
        decode_image(png_with(chunk(kind, b"\1\2\3", 5)), "x")


def test_a_png_with_parts_twice_or_unknown_ones_is_damaged():
    header = encoded("PNG")[8:33]
    for added in (header, chunk(b"FOOT", b""), chunk(b"tRNS", bytes(6)) * 2, chunk(b"PLTE", bytes(3)) * 2):
        with pytest.raises(ValueError, match="x is damaged or truncated"):
            decode_image(png_with(added), "x")


# Upright


def turned(value):
    image = picture()
    image.getexif()[0x0112] = value
    return np.asarray(ImageOps.exif_transpose(image))


def png_text(key, text, kind="iTXt", packed=False):
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if kind == "iTXt" else info.add_text)(key, text, zip=packed)
    return encoded("PNG", pnginfo=info)


def raw_profile(content):
    return f"\nexif\n{len(content):8d}\n" + "\n".join(content.hex()[i : i + 72] for i in range(0, 2 * len(content), 72))


@pytest.mark.parametrize("value", range(12))
@pytest.mark.parametrize("order", "<>")
def test_orientations_in_all_the_places_that_pillow_knows(value, order):
    content = exif(value, order=order)
    text = raw_profile(b"Exif\0\0" + content)
    files = {
        "png": png_with(chunk(b"eXIf", content)),
        "png, behind": png_with(behind=[chunk(b"eXIf", content)]),
        "png, packed profile": png_text("Raw profile type exif", text, "zTXt", packed=True),
        "png, profile": png_text("Raw profile type exif", text, "tEXt"),
        "webp": webp_with((b"EXIF", content), flags=8, lossless=True),
        "jpeg": jpeg_with(segment(0xE1, b"Exif\0\0" + content), quality=100, subsampling=0),
        "jpeg, in two": jpeg_with(segment(0xE1, b"Exif\0\0" + content[:20]), segment(0xE1, b"Exif\0\0" + content[20:])),
    }
    if value < 10:
        xmp = XMP.replace(b"6", b"%d" % value)
        files["png, XMP"] = png_text("XML:com.adobe.xmp", xmp.decode())
        files["png, packed XMP"] = png_text("XML:com.adobe.xmp", xmp.decode(), packed=True)
        files["jpeg, XMP"] = jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp))
        files["webp, XMP"] = webp_with((b"XMP ", xmp), flags=4)
    for name, data in files.items():
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(pixels(data), expected), name
        assert expected.shape == ((24, 20, 3) if value in (5, 6, 7, 8) else (20, 24, 3)), name


@pytest.mark.parametrize(
    "content",
    [
        exif(b"6\0", kind=2, count=2),  # a text
        exif(struct.pack("<ff", 6, 1), kind=11, count=1),
        exif(6, count=2),  # two of them
        exif(6)[:20],  # cut off
        exif(6, tag=0x0111),
        exif(6).replace(b"II*\0", b"II+\1"),
        exif(6)[:4] + b"\xff\xff\xff\x7f" + exif(6)[8:],
    ],
)
def test_orientations_that_cannot_be_read_turn_nothing(content):
    assert orientation(content, None) is None
    assert np.array_equal(pixels(jpeg_with(segment(0xE1, b"Exif\0\0" + content))), by_pillow(encoded("JPEG")))


def test_changed_bytes_of_exif_turn_a_picture_as_pillow_does_or_not_at_all():
    rng = np.random.default_rng(0)
    many = Image.Exif()
    for tag, value in ((0x010E, "a picture"), (0x0112, 6), (0x011A, 72.0), (0x0132, "2024:01:01 00:00:00")):
        many[tag] = value
    whole = many.tobytes()
    num_compared = 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(6, len(data)))] = int(rng.integers(256))
        found = orientation(bytes(data), None)
        read = Image.Exif()
        expected = None
        with warnings.catch_warnings(), suppress(Exception):  # what Pillow cannot read may be read or not
            warnings.simplefilter("ignore")
            read.load(bytes(data))
            expected = read.get(0x0112)
        if expected is not None:
            assert found == TURNS.get(expected), data
            num_compared += 1
    assert num_compared > 500


def test_pillow_images_with_broken_exif_are_read():
    with Image.open(io.BytesIO(HARMLESS_WEBP["exif b'garbage'"])) as image:
        assert np.array_equal(np.asarray(load_image(image)), by_pillow(encoded("WEBP")))


# Costs


def progressive(num_scans, size=(64, 64)):
    """A JPEG whose last scan is repeated until it has `num_scans`."""
    data = encoded("JPEG", Image.new("L", size, 90), progressive=True)
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    last = data[starts[-1] : -2]
    return data[:-2] + last * (num_scans - len(starts)) + data[-2:]


def test_jpegs_of_many_scans_are_refused_before_they_are_decoded():
    assert np.asarray(decode_image(progressive(MAX_SCANS), "x")).shape == (64, 64)
    for num_scans in (MAX_SCANS + 1, 2000, 300_000):
        data = progressive(num_scans, (4096, 4096))
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"x takes too long to decode: more than 100 scans; save it again"):
            decode_image(data, "x")
        assert time.monotonic() - start < 1


def test_large_jpegs_may_have_fewer_scans():
    for side, most in ((4096, 100), (4097, 99), (8192, 25)):
        data = progressive(most)
        at_size = data.index(b"\xff\xc2") + 5
        claimed = data[:at_size] + struct.pack(">HH", side, side) + data[at_size + 4 :]
        assert strip_metadata(claimed).data == claimed
        scan = claimed[claimed.rindex(b"\xff\xda") : -2]
        with pytest.raises(CostlyImageError, match=f"more than {most} scans"):
            strip_metadata(claimed[:-2] + scan + claimed[-2:])


def test_a_huge_jpeg_is_too_large_however_few_scans_it_has():
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    with pytest.raises(ValueError, match=r"x is too large to read safely \(9000 x 9000 pixels\)"):
        decode_image(data[:at] + struct.pack(">HH", 9000, 9000) + data[at + 4 :], "x")


def test_sizes_are_read_whatever_else_is_in_a_file():
    for data in (*HARMLESS_PNG.values(), *HARMLESS_JPEG.values(), *HARMLESS_WEBP.values()):
        assert read_image_size(data, "x") == (24, 20)
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    assert read_image_size(data[:at] + struct.pack(">HH", 9000, 9001) + data[at + 4 :], "x") == (9001, 9000)
    with pytest.raises(ValueError, match="x is not an image"):
        read_image_size(b"none", "x")


def test_scans_are_counted_where_the_decoder_finds_them():
    """Not those inside of segments, nor behind the end; but those between restart marks, filling and garbage."""
    inside = segment(0xE1, b"Exif\0\0" + exif(1) + b"\xff\xda" * 20_000)
    data = encoded("JPEG", picture(0, (640, 480)), restart_marker_blocks=1, quality=30)
    assert np.array_equal(pixels(data[:2] + inside + data[2:] + b"\xff\xda\0\2" * 900), by_pillow(data))
    many = progressive(300)
    scan = many.rindex(b"\xff\xda")
    for added in (b"\xff\xff\xff", b"\xff\0", b"\xff\xd0", b"garbage", b"\xff\x01"):
        begin = scan - 5000
        begin = many.index(b"\xff\xda", begin)
        with pytest.raises(ValueError, match="more than 100 scans"):
            decode_image(many[:begin] + added + many[begin:], "x")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff\x00" * 8_000_000,
        b"\xff\xd8\xff" + b"\xff\xd0" * 8_000_000,
        b"\xff\xd8\xff" + b"\xff" * 16_000_000,
        b"\xff\xd8" + b"\xff\xe1\0\2" * 4_000_000,
        b"\xff\xd8" + b"\xff\xfe\0\3x" * 3_000_000,
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"") * 1_000_000,
        b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"") * 1_000_000,
        b"RIFF\xff\xff\xff\x7fWEBP" + bytes(16_000_000),
        b"RIFF\xff\xff\xff\x7fWEBP" + (b"EXIF" + bytes(4)) * 2_000_000,
    ],
    ids=["stuffing", "restarts", "filling", "segments", "comments", "pixel chunks", "text chunks", "zeros", "chunks"],
)
def test_files_made_to_take_long_are_refused_soon(data):
    start = time.process_time()  # whatever else the machine is doing
    with pytest.raises(ValueError, match="x "):
        decode_image(data, "x")
    assert time.process_time() - start < 3


def test_animations_of_many_pictures_take_the_time_of_one():
    image = picture(0, (256, 256))
    others = [picture(i % 3, (256, 256)) for i in range(60)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(kind, image, save_all=True, append_images=others, **options)
        start = time.process_time()
        assert np.array_equal(pixels(data), np.asarray(image))
        assert time.process_time() - start < 1


def test_what_is_handed_to_the_decoder_is_small_and_itself_stays_as_it_is():
    for data in (*HARMLESS_PNG.values(), *HARMLESS_JPEG.values(), *HARMLESS_WEBP.values()):
        reduced = strip_metadata(data).data
        assert len(reduced) < 4000
        assert strip_metadata(reduced).data == reduced
