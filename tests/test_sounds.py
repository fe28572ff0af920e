"""What the bytes of a sound are, and how long it lasts, whatever its headers say."""

from __future__ import annotations

import io
import struct
import wave

import pytest

from testbed.answers import SOUND_DURATION_S, sound_flac, sound_mp3, sound_opus, sound_wav
from tests.lab import table
from workerkit import sounds
from workerkit.errors import FailJob
from workerkit.sentences import NO_SOUND, UNUSABLE
from workerkit.sounds import inspect_sound


def seconds_of(data: bytes) -> float:
    return inspect_sound(data)[1]


def about(seconds: float) -> object:
    return pytest.approx(seconds, rel=0.05)


@table(
    "data, sound_format",
    ("WAV", sound_wav(), "wav"),
    ("MP3", sound_mp3(), "mp3"),
    ("FLAC", sound_flac(), "flac"),
    ("Opus in Ogg", sound_opus(), "opus"),
)
def test_a_sounds_duration_and_format_are_read_from_its_bytes(data: bytes, sound_format: str) -> None:
    same, duration_s, found = inspect_sound(data)
    assert (same, found) == (data, sound_format)
    assert duration_s == about(SOUND_DURATION_S)


@table("data", ("WAV", sound_wav()), ("MP3", sound_mp3()), ("FLAC", sound_flac()), ("Opus in Ogg", sound_opus()))
@table("files", ("two", 2), ("three", 3))
def test_files_one_behind_the_other_last_as_long_as_all_of_them(data: bytes, files: int) -> None:
    assert seconds_of(data * files) == about(SOUND_DURATION_S * files)


# ── WAV ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PCM, FLOAT, A_LAW, EXTENSIBLE = 1, 3, 6, 0xFFFE
PCM_GUID = struct.pack("<HHI", 22, 16, 4) + b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
UNKNOWN = 0xFFFFFFFF


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<4sI", name, len(content) if size is None else size) + content + b"\0" * (len(content) % 2)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"".join(chunks)
    return struct.pack("<4sI4s", b"RIFF", len(body) + 4 if size is None else size, b"WAVE") + body


def wav_form(codec: int = PCM, bits: int = 16, extra: bytes = b"") -> bytes:
    """The format of a sound of 8000 samples a second."""
    block = bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", codec, 1, 8000, 8000 * block, block, bits) + extra)


SECOND = bytes(16_000)  # of 16 bits
COMMENT = chunk(b"LIST", b"INFOICMT with data in it")


@table(
    "data",
    ("8 bits", riff(wav_form(bits=8), chunk(b"data", bytes(8_000)))),
    ("24 bits", riff(wav_form(bits=24), chunk(b"data", bytes(24_000)))),
    ("float", riff(wav_form(FLOAT, 32), chunk(b"data", bytes(32_000)))),
    ("A-law", riff(wav_form(A_LAW, 8, b"\0\0"), chunk(b"data", bytes(8_000)))),
    ("the extensible form", riff(wav_form(EXTENSIBLE, 16, PCM_GUID), chunk(b"data", SECOND))),
    ("a comment before the samples", riff(wav_form(), COMMENT, chunk(b"data", SECOND))),
    ("a comment behind the samples", riff(wav_form(), chunk(b"data", SECOND), COMMENT)),
    ("an odd comment", riff(wav_form(), chunk(b"LIST", b"odd"), chunk(b"data", SECOND))),
    ("a comment before the format", riff(chunk(b"JUNK", bytes(28)), wav_form(), chunk(b"data", SECOND))),
)
def test_a_wav_of_any_form_lasts_as_long_as_its_samples(data: bytes) -> None:
    assert inspect_sound(data) == (data, 1.0, "wav")


def test_an_odd_number_of_samples_needs_no_byte_behind() -> None:
    whole = riff(wav_form(bits=8), chunk(b"data", bytes(8_001)))
    assert [seconds_of(data) for data in (whole, whole[:-1])] == [1.0, 1.0]


STREAMED_WAVS = table(
    "data, seconds",
    ("sizes of 0", riff(wav_form(), chunk(b"data", SECOND, 0), size=0), 1),
    ("sizes of 0xFFFFFFFF", riff(wav_form(), chunk(b"data", SECOND, UNKNOWN), size=UNKNOWN), 1),
    ("sizes that are too large", riff(wav_form(), chunk(b"data", SECOND, 2**31), size=2**31 + 36), 1),
    ("only the samples' size is 0", riff(wav_form(), chunk(b"data", SECOND, 0)), 1),
    ("only the samples' size is too large", riff(wav_form(), chunk(b"data", SECOND, 16_001)), 1),
    ("only the whole size is wrong", riff(wav_form(), chunk(b"data", SECOND), size=1234), 1),
    ("a comment before the samples", riff(wav_form(), COMMENT, chunk(b"data", SECOND, UNKNOWN), size=UNKNOWN), 1),
    ("an odd comment", riff(wav_form(), chunk(b"LIST", b"odd"), chunk(b"data", SECOND, 0), size=0), 1),
    ("half a sample at the end", riff(wav_form(), chunk(b"data", SECOND, UNKNOWN), size=UNKNOWN) + b"\1", 1),
    ("joined", riff(wav_form(), chunk(b"data", SECOND)) * 2, 2),
    ("three joined, streamed", riff(wav_form(), chunk(b"data", SECOND, UNKNOWN), size=UNKNOWN) * 3, 3),
    ("joined, with comments", riff(wav_form(), COMMENT, chunk(b"data", SECOND), COMMENT) * 2, 2),
    ("a streamed one before a whole one", sound_wav(streaming=True) + sound_wav(), 2 * SOUND_DURATION_S),
)


@STREAMED_WAVS
def test_a_streamed_or_joined_wav_gets_its_true_sizes(data: bytes, seconds: float) -> None:
    fixed, duration_s, _ = inspect_sound(data)
    assert duration_s == pytest.approx(seconds)
    with wave.open(io.BytesIO(fixed)) as sound:
        samples = sound.readframes(sound.getnframes())
        assert len(samples) == 2 * sound.getnframes() == pytest.approx(2 * seconds * sound.getframerate())


@STREAMED_WAVS
def test_a_wav_with_true_sizes_stays_as_it_is(data: bytes, seconds: float) -> None:
    fixed = inspect_sound(data)[0]
    assert inspect_sound(fixed) == (fixed, seconds, "wav")


def test_the_samples_of_joined_wavs_follow_each_other() -> None:
    parts = [riff(wav_form(), chunk(b"data", bytes([number]) * 800)) for number in (1, 2)]
    assert inspect_sound(b"".join(parts))[0] == riff(wav_form(), chunk(b"data", b"\1" * 800 + b"\2" * 800))


# ── MP3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def mp3(second: int, third: int, length: int, frames: int = 20, fourth: int = 0x64) -> bytes:
    """Silent frames of this header and length."""
    return (bytes([0xFF, second, third, fourth]) + bytes(length - 4)) * frames


def info(name: bytes, frames: int, delays: bytes = b"") -> bytes:
    """The frame without sound that tells a player how many follow."""
    fields = struct.pack(">II", 1, frames) + (b"LAME3.100".ljust(21, b"\0") + delays if delays else b"")
    return b"\xff\xfb\x90\x64" + bytes(32) + (name + fields).ljust(381, b"\0")


def id3(content: bytes, flags: int = 0, end: bytes = b"") -> bytes:
    return b"ID3\4\0" + bytes([flags, 0, 0, len(content) >> 7, len(content) & 0x7F]) + content + end


CBR = mp3(0xFB, 0x90, 417)  # 128 kbit/s at 44.1 kHz: 20 frames of 1152 samples
CBR_S = 20 * 1152 / 44_100
FASTER = mp3(0xFB, 0xB4, 576)  # 192 kbit/s at 48 kHz
FASTER_S = 20 * 1152 / 48_000
SLOWER = mp3(0xF3, 0x84, 192)  # 64 kbit/s at 24 kHz: frames of 576 samples
SLOWER_S = 20 * 576 / 24_000
VBR = b"".join(mp3(0xFB, third, length, 5) for third, length in ((0x90, 417), (0xB2, 627), (0x52, 209), (0x90, 417)))
APE_ITEM = b"\4\0\0\0\0\0\0\0Year\x002026"
APE_SIZES = struct.pack("<III", 2000, 32 + len(APE_ITEM), 1)
APE_HEADER, APE_FOOTER = (b"APETAGEX" + APE_SIZES + bytes([0, 0, 0, flags]) + bytes(8) for flags in (0xA0, 0x80))


@table(
    "data, seconds",
    ("a constant bit rate", CBR, CBR_S),
    ("a variable bit rate without a count", VBR, CBR_S),
    ("mono", mp3(0xFB, 0x90, 417, fourth=0xC4), CBR_S),
    ("checksums", mp3(0xFA, 0x90, 417), CBR_S),
    ("padding", mp3(0xFB, 0x92, 418), CBR_S),
    ("MPEG-2", SLOWER, SLOWER_S),
    ("MPEG-2.5", mp3(0xE3, 0x48, 288), 20 * 576 / 8_000),
    ("joined, of different rates", CBR + FASTER + SLOWER, CBR_S + FASTER_S + SLOWER_S),
)
def test_an_mp3_lasts_as_long_as_its_frames(data: bytes, seconds: float) -> None:
    assert inspect_sound(data) == (data, about(seconds), "mp3")


@table(
    "data, seconds",
    ("of the first file", info(b"Info", 20) + CBR + info(b"Info", 20) + FASTER, CBR_S + FASTER_S),
    ("Xing, of too many frames", info(b"Xing", 9999) + VBR, CBR_S),
    ("Info, of too few frames", info(b"Info", 1) + CBR, CBR_S),
    ("Info, of none", info(b"Info", 0) + CBR, CBR_S),
    ("VBRI", info(b"VBRI", 9999) + VBR, CBR_S),
)
def test_an_mp3s_count_of_frames_is_not_believed(data: bytes, seconds: float) -> None:
    assert seconds_of(data) == pytest.approx(seconds, abs=0.006)  # the frame with the count would be 0.026


def test_the_silence_that_an_encoder_added_is_not_counted() -> None:
    at_both_ends = info(b"Info", 20, delays=(1105 << 12 | 1000).to_bytes(3, "big"))
    assert seconds_of(at_both_ends + CBR) == pytest.approx(CBR_S - 2105 / 44_100, abs=0.006)


@table(
    "data",
    ("ID3v2 in front", id3(bytes(300)) + CBR + FASTER),
    ("ID3v2 that contains a frame", id3(CBR[:900]) + CBR + FASTER),
    ("ID3v2 with a footer", id3(bytes(300), 0x10, b"3DI\4\0\x10\0\0\2\x2c") + CBR + FASTER),
    ("ID3v2 in the middle", CBR + id3(bytes(300)) + FASTER),
    ("ID3v1 behind", CBR + FASTER + b"TAG".ljust(128, b" ")),
    ("ID3v1 in the middle", CBR + b"TAG".ljust(128, b" ") + FASTER),
    ("APE behind", CBR + FASTER + APE_HEADER + APE_ITEM + APE_FOOTER),
    ("APE in the middle", CBR + APE_HEADER + APE_ITEM + APE_FOOTER + FASTER),
    ("APE without a header in the middle", CBR + APE_ITEM + APE_FOOTER + FASTER),
    ("garbage in front", b"garbage " * 50 + CBR + FASTER),
    ("garbage between the frames", CBR + b"garbage \xff\xfb\x90\x64 " * 50 + FASTER),
    ("zeros behind", CBR + FASTER + bytes(4000)),
    ("a last frame that is cut", CBR + FASTER + FASTER[:300]),
)
def test_what_is_no_frame_of_an_mp3_has_no_duration(data: bytes) -> None:
    assert seconds_of(data) == pytest.approx(CBR_S + FASTER_S, abs=0.006)


# ── Ogg Opus ─────────────────────────────────────────────────────────────────────────────────────────────────────

FIRST, LAST, CONTINUED = 2, 4, 1
PACKET, FRAME_SAMPLES = b"\xf8\xff\xfe", 960  # 20 ms of silence
SKIPPED = 312


def page(packets: list[bytes], position: int, flags: int = 0, ends: bool = True) -> bytes:
    """An Ogg page. The last packet goes on in the next page unless it ends."""
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    lacing = lacing if ends else lacing[:-1]
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, position, 1, 0, 0)
    return head + bytes([len(lacing)]) + lacing + b"".join(packets)


OPUS_HEAD = page([struct.pack("<8sBBHIHB", b"OpusHead", 1, 1, SKIPPED, 48_000, 0, 0)], 0, FIRST)
OPUS_TAGS = page([b"OpusTags" + bytes(8)], 0)


def opus(*positions: int, cut_samples: int = 0) -> bytes:
    """A stream with half a second in each page, which ends at this position."""
    pages = [page([PACKET] * 25, position) for position in positions[:-1]]
    return b"".join([OPUS_HEAD, OPUS_TAGS, *pages, page([PACKET] * 25, positions[-1] - cut_samples, LAST)])


TRUE = [24_000 * number for number in range(1, 5)]
TWO_S = opus(*TRUE)
LARGE_TAGS = page([b"OpusTags" + bytes(502)], -1, ends=False) + page([bytes(300)], 0, CONTINUED)


@table(
    "data, seconds",
    ("plain", TWO_S, 2),
    ("chained", TWO_S + TWO_S, 4),
    ("without the last page", TWO_S[: TWO_S.rindex(b"OggS")], 1.5),
    ("with a last page that is cut", TWO_S[:-10], 1.5),
    ("positions that start late", opus(*(10**9 + position for position in TRUE)), 2),
    ("positions of 0", opus(0, 0, 0, 0), 2),
    ("positions of -1", opus(-1, -1, -1, -1), 2),
    ("tags of two pages", OPUS_HEAD + LARGE_TAGS + TWO_S[TWO_S.index(OPUS_TAGS) + len(OPUS_TAGS) :], 2),
    ("garbage between the pages", TWO_S[: TWO_S.rindex(b"OggS")] + b"garbage" + TWO_S[TWO_S.rindex(b"OggS") :], 2),
)
def test_an_opus_sound_lasts_as_long_as_its_packets(data: bytes, seconds: float) -> None:
    streams = data.count(b"OpusHead")
    same, duration_s, sound_format = inspect_sound(data)
    assert (same, sound_format) == (data, "opus")
    assert duration_s == pytest.approx(seconds - streams * SKIPPED / 48_000, abs=0.006)


def test_the_end_of_an_opus_sound_that_players_cut_is_not_counted() -> None:
    assert seconds_of(opus(*TRUE, cut_samples=19_200)) == pytest.approx(1.6 - SKIPPED / 48_000, abs=0.006)


@table(
    "packet, packet_s",
    ("speech, 60 ms", b"\x18\0", 0.06),
    ("hybrid, 10 ms", b"\x60\0", 0.01),
    ("music, 2.5 ms", b"\x80\0", 0.0025),
    ("two frames", b"\xf9\0\0", 0.04),
    ("two frames of different sizes", b"\xfa\1\0\0", 0.04),
    ("six frames", b"\xfb\x06" + bytes(6), 0.12),
    ("longer than a page's unit", b"\xf8" + bytes(600), 0.02),
    ("silence of one byte", b"\xf8", 0.02),
)
def test_an_opus_packets_duration_is_in_its_first_bytes(packet: bytes, packet_s: float) -> None:
    pages = page([packet] * 50, 0) * 4
    assert seconds_of(OPUS_HEAD + OPUS_TAGS + pages) == pytest.approx(200 * packet_s - SKIPPED / 48_000, abs=0.006)


def test_an_opus_packet_in_two_pages_counts_once() -> None:
    pages = page([PACKET] * 49 + [b"\xf8" + bytes(254)], 0, ends=False) + page([bytes(9)] + [PACKET] * 50, 0, CONTINUED)
    assert seconds_of(OPUS_HEAD + OPUS_TAGS + pages) == pytest.approx(2 - SKIPPED / 48_000, abs=0.006)


# ── FLAC ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RATE = 8_000


def checksum_8(data: bytes) -> int:
    value = 0
    for bit in (byte >> place & 1 for byte in data for place in range(7, -1, -1)):
        value = (value << 1 & 0xFF) ^ (0x07 if value >> 7 ^ bit else 0)
    return value


def flac_head(count: int = 0) -> bytes:
    return b"fLaC\x80\0\0\x22" + bytes(10) + (RATE << 44 | 15 << 36 | count).to_bytes(8, "big") + bytes(16)


def flac_frame(number: int, code: int = 0x30, size: bytes = b"", by_sample: bool = False) -> bytes:
    """A frame with some of what looks like a frame in it. The code 3 says 1152 samples, 7 that the size follows."""
    header = bytes([0xFF, 0xF8 | by_sample, code, 0x08]) + chr(number).encode() + size
    return header + bytes([checksum_8(header)]) + b"\xff\xf8\x30\x08\x01\x02 silence"


FLAC_FRAMES = b"".join(flac_frame(number) for number in range(200))  # the numbers from 128 take two bytes
FLAC_COUNT = 200 * 1152
BY_SAMPLE = b"".join(flac_frame(number * 1000, 0x70, b"\x03\xe7", by_sample=True) for number in range(40))


@table(
    "data, count",
    ("numbered frames", flac_head(FLAC_COUNT) + FLAC_FRAMES, FLAC_COUNT),
    ("numbered samples", flac_head(40_000) + BY_SAMPLE, 40_000),
    (
        "a shorter last frame",
        flac_head(FLAC_COUNT + 100) + FLAC_FRAMES + flac_frame(200, 0x60, b"\x63"),
        FLAC_COUNT + 100,
    ),
)
def test_a_flac_lasts_as_long_as_its_frames(data: bytes, count: int) -> None:
    assert inspect_sound(data) == (data, about(count / RATE), "flac")


@table("count", ("none", 0), ("too many", 2**36 - 1), ("too few", 1152))
def test_a_flac_gets_its_true_count_of_samples(count: int) -> None:
    true, duration_s, _ = inspect_sound(flac_head(count) + FLAC_FRAMES)
    assert true == flac_head(FLAC_COUNT) + FLAC_FRAMES
    assert duration_s == about(FLAC_COUNT / RATE)


def test_joined_flacs_keep_their_headers() -> None:
    joined = (flac_head() + FLAC_FRAMES) + (flac_head(40_000) + BY_SAMPLE)
    assert inspect_sound(joined) == (joined, about((FLAC_COUNT + 40_000) / RATE), "flac")


# ── what is no sound ─────────────────────────────────────────────────────────────────────────────────────────────

AAC = (b"\xff\xf1\x50\x80\x04\x1f\xfc" + bytes(25)) * 20  # 32 bytes each
VORBIS = page([b"\x01vorbis" + bytes(23)], 0, FIRST)
RAW = b"".join(struct.pack("<h", number * 7919 % 20_011 - 10_000) for number in range(4_000))


@table(
    "data",
    ("a page", b"<html>no sound</html>"),
    ("JSON", b'{"error": {"message": "no sound"}}'),
    ("garbage", b"\x01\x02\x03" * 100),
    ("garbage that begins as an MP3", b"\xff\x00garbage" * 50),
    ("garbage with a few frames of MP3", CBR[:834] + b"garbage" * 500),
    ("samples without a header", RAW),
    ("silent samples without a header", SECOND),
    ("Ogg Vorbis", VORBIS + TWO_S[TWO_S.index(OPUS_TAGS) :]),
    ("MPEG layer II", mp3(0xFD, 0x84, 417)),
    ("a tag alone", id3(bytes(300))),
    ("a head alone", b"RIFF"),
    ("a WAV without a format", riff(chunk(b"data", SECOND))),
    ("a WAV without a rate", riff(chunk(b"fmt ", bytes(16)), chunk(b"data", SECOND))),
    ("a WAV without samples", riff(wav_form(), chunk(b"data", b""))),
    ("a cut FLAC", b"fLaC" + bytes(3)),
    ("a FLAC without frames", flac_head(FLAC_COUNT)),
    ("a cut Ogg", sound_opus()[:40]),
    ("an Ogg without packets", OPUS_HEAD + OPUS_TAGS),
    ("a cut header of Opus", page([b"OpusHead\1\1"], 0, FIRST) + OPUS_TAGS),
)
def test_what_is_no_sound_fails_the_job(data: bytes) -> None:
    with pytest.raises(FailJob) as caught:
        inspect_sound(data)
    assert caught.value.sentence == UNUSABLE


def test_an_empty_sound_has_its_own_sentence() -> None:
    with pytest.raises(FailJob) as caught:
        inspect_sound(b"")
    assert caught.value.sentence == NO_SOUND


@table(
    "data", ("plain", AAC), ("behind a tag", id3(bytes(63)) + AAC), ("with checksums", AAC.replace(b"\xf1", b"\xf0"))
)
def test_the_log_says_that_a_sound_is_aac(data: bytes) -> None:
    with pytest.raises(FailJob, match="AAC") as caught:
        inspect_sound(data)
    assert caught.value.sentence == UNUSABLE


# The files are made in the test, since each of pytest's processes would make them otherwise.
@table(
    "beginning, piece",
    ("false beginnings of MP3 frames", b"", b"\xff\xfb\x90\x00"),
    ("empty tags", b"", b"ID3\4\0\0\0\0\0\0"),
    ("headers of WAVs", b"", b"RIFF\0\0\0\0WAVE"),
    ("chunks of a WAV", riff(), chunk(b"much", b"")),
    ("headers of FLACs", b"", b"fLaC\x80\0\0\x22"),
    ("false beginnings of FLAC frames", flac_head(), b"\xff\xf8\x30\x08"),
)
def test_a_file_of_too_many_pieces_that_are_no_sound_fails_the_job(beginning: bytes, piece: bytes) -> None:
    with pytest.raises(FailJob, match="more noise than sound"):
        inspect_sound(beginning + piece * 201_000)


@table(
    "data",
    ("MP3", CBR),
    ("packets of Opus", OPUS_HEAD + page([PACKET] * 20, 0)),
    ("empty pages of Ogg", OPUS_HEAD + page([], 0) * 20),
    ("FLAC", flac_head() + FLAC_FRAMES),
)
def test_a_sound_of_too_many_frames_fails_the_job(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MAX_FRAMES", 19)
    with pytest.raises(FailJob, match="too long"):
        inspect_sound(data)
