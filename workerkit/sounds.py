"""What the bytes of a sound are, and how long it really lasts: every frame, page and chunk of it is walked.

Servers stream sounds and join files, so headers lie: they have no sizes, none for what follows, or those of the first
part. tinytag and mutagen believe them; PyAV (100 MB) misses chained Ogg streams and joined WAVs; miniaudio knows no
Opus. Nothing is decoded here, so a sound takes no more memory than its bytes.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from workerkit.errors import FailJob
from workerkit.sentences import NO_SOUND, UNUSABLE

MAX_SOUND_S = 86_400.0
MAX_FRAMES = 1_000_000  # 7 hours of MP3
MAX_ODD_PIECES = 200_000
NOISE, TOO_LONG = "more noise than sound", "too long"


def unusable(why: str) -> FailJob:
    return FailJob(f"no sound: {why}", UNUSABLE)


class Patience:
    """How many more pieces of a file are looked at: a hostile one has millions, and each takes time."""

    def __init__(self, pieces: int = MAX_ODD_PIECES, what_it_is: str = NOISE) -> None:
        self.left, self.what_it_is = pieces, what_it_is

    def spend(self, pieces: int = 1) -> None:
        self.left -= pieces
        if self.left < 0:
            raise unusable(self.what_it_is)


# ── WAV: RIFF chunks (Microsoft's Multimedia Programming Interface 1.0) ──────────────────────────────────────────

RIFF = re.compile(rb"RIFF....WAVE", re.DOTALL)
UNKNOWN_SIZES = (0, 0xFFFFFFFF)
PLAIN_CODECS = (1, 3, 6, 7, 0xFFFE)  # PCM, float, A-law, mu-law, and the extensible form of these


def wav_chunks(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of one WAV: name, and where the content begins and ends. A size that can't be true means the rest."""
    at = start + 12
    while at + 8 <= end:
        name, size = struct.unpack_from("<4sI", data, at)
        begins, is_samples = at + 8, name == b"data"
        ends = begins + size
        if ends > end or (is_samples and size in UNKNOWN_SIZES):
            ends = end
        yield name, begins, ends
        at = ends + (ends - begins) % 2


def wav_parts(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The format and the samples of each WAV, where several stand one behind the other."""
    patience = Patience()
    starts = (found.start() for found in RIFF.finditer(data))
    for start, end in itertools.pairwise(itertools.chain(starts, [len(data)])):
        patience.spend()
        places = {b"fmt ": (end, end), b"data": (end, end)}
        for name, begins, ends in wav_chunks(data, start, end):
            patience.spend()
            if places.get(name) == (end, end):
                places[name] = begins, ends
        form, samples = (data[slice(*place)] for place in places.values())
        if len(form) >= 16:
            yield form, samples


def with_true_sizes(data: bytes, form: bytes, samples: bytes) -> bytes:
    """The WAV itself if its sizes are true, else a new one of its format and its samples alone."""
    (size,) = struct.unpack_from("<I", data, 4)
    is_true = size == len(data) - 8 and struct.pack("<4sI", b"data", len(samples)) + samples[:64] in data
    if is_true and len(RIFF.findall(data)) == 1:
        return data
    chunks = [(b"fmt ", form), (b"data", samples)]
    body = [struct.pack("<4sI", name, len(part)) + part + b"\0" * (len(part) % 2) for name, part in chunks]
    return b"".join([struct.pack("<4sI4s", b"RIFF", sum(map(len, body)) + 4, b"WAVE"), *body])


def walk_wav(data: bytes) -> tuple[bytes, float]:
    """The WAV with true sizes in its header, and its duration. Joined ones of the same format become one."""
    parts = list(wav_parts(data))
    if not parts:
        raise unusable("a WAV without a format")
    form = parts[0][0]
    samples = b"".join(part for other, part in parts if other[:16] == form[:16])
    codec, _, rate, bytes_a_second, block = struct.unpack_from("<HHIIH", form)
    bytes_a_second = rate * block if codec in PLAIN_CODECS else bytes_a_second
    if not bytes_a_second or not block:
        raise unusable("a WAV without a rate")
    samples = samples[: len(samples) - len(samples) % block]
    return with_true_sizes(data, form, samples), len(samples) / bytes_a_second


# ── MP3: frames of MPEG audio, layer III (ISO 11172-3, 13818-3) ──────────────────────────────────────────────────

# Version 2.5, 2 or 1, layer III; neither a free bit rate nor a forbidden one.
MP3_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]")
KBPS_OF_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBPS_OF_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
RATES_OF_1 = (44_100, 48_000, 32_000)
RATE_PARTS = {3: 1, 2: 2, 0: 4}  # by the version's bits: 1, 2, 2.5
INFO = re.compile(rb"Xing|Info|VBRI")  # in the first frame of a file, which has no sound
INFO_FIELDS_BYTES = (4, 4, 100, 4)
LAME_DELAYS_AT, ENCODERS = 21, (b"LAME", b"Lavf", b"Lavc")
IS_APE_HEADER, APE_EDGE_BYTES = 0x20, 32


class Mp3Frame(NamedTuple):
    length: int
    samples: int
    rate: int


def mp3_frame(version: int, third: int) -> Mp3Frame:
    """What a frame is, by the version's bits and the third byte of its header."""
    is_1 = version == 3
    rate = RATES_OF_1[third >> 2 & 3] // RATE_PARTS[version]
    kbps, samples = (KBPS_OF_1 if is_1 else KBPS_OF_2)[third >> 4], 1152 if is_1 else 576
    return Mp3Frame(samples * kbps * 125 // rate + (third >> 1 & 1), samples, rate)


MP3_FRAMES = {
    bytes([0xFF, 0xE2 | version << 3 | is_unprotected, third]): mp3_frame(version, third)
    for version, is_unprotected, third in itertools.product(RATE_PARTS, (0, 1), range(0x10, 0xF0))
    if third >> 2 & 3 != 3
}


def mp3_frame_at(data: bytes, at: int) -> Mp3Frame | None:
    return MP3_FRAMES.get(data[at : at + 3])


def tag_bytes(data: bytes, at: int) -> int:
    """The length of the tag that begins here (ID3v2, ID3v1, APE), or 0."""
    if data.startswith(b"ID3", at) and at + 10 <= len(data):
        first, second, third, fourth = data[at + 6 : at + 10]
        return 10 + (first << 21 | second << 14 | third << 7 | fourth) + (10 if data[at + 5] & 0x10 else 0)
    if data.startswith(b"APETAGEX", at) and at + APE_EDGE_BYTES <= len(data):
        size = int.from_bytes(data[at + 12 : at + 16], "little")
        return APE_EDGE_BYTES + (size if data[at + 23] & IS_APE_HEADER else 0)
    return 128 if data.startswith(b"TAG", at) else 0


def next_mp3_frame(data: bytes, at: int, patience: Patience) -> int:
    """Where the next frame begins that another one, a tag or the end follows; the data's length if there is none."""
    for found in MP3_SYNC.finditer(data, at):
        patience.spend()
        if frame := mp3_frame_at(data, found.start()):
            behind = found.start() + frame.length
            if behind == len(data) or mp3_frame_at(data, behind) or tag_bytes(data, behind):
                return found.start()
    return len(data)


def mp3_frames(data: bytes) -> Iterator[tuple[int, Mp3Frame]]:
    """Each whole frame and where it begins. Other files have bytes that look like some, but most of theirs don't."""
    at, noise_bytes, patience = 0, 0, Patience()
    while at < len(data):
        if frame := mp3_frame_at(data, at):
            if at + frame.length <= len(data):
                yield at, frame
            at += frame.length
            continue
        patience.spend()
        if size := tag_bytes(data, at):
            at += size
        else:
            begins = next_mp3_frame(data, at + 1, patience)
            noise_bytes, at = noise_bytes + begins - at, begins
    if noise_bytes > len(data) / 2:
        raise unusable(NOISE)


def added_samples(data: bytes, at: int) -> int:
    """How many samples of silence the encoder has added at both ends, by the Xing or Info that begins here."""
    flags = int.from_bytes(data[at + 4 : at + 8], "big")
    at += 8 + sum(size for bit, size in enumerate(INFO_FIELDS_BYTES) if flags >> bit & 1)
    if not data.startswith(ENCODERS, at):
        return 0
    both = int.from_bytes(data[at + LAME_DELAYS_AT : at + LAME_DELAYS_AT + 3], "big")
    return (both >> 12) + (both & 0xFFF)


def walk_mp3(data: bytes) -> float:
    """The seconds of all frames, of joined files as well, without the silence that players leave out."""
    seconds, patience = 0.0, Patience(MAX_FRAMES, TOO_LONG)
    for at, (_, samples, rate) in mp3_frames(data):
        patience.spend()
        info = INFO.search(data, at + 4, at + 42)
        seconds += (-added_samples(data, info.start()) if info else samples) / rate
        if seconds > MAX_SOUND_S:
            break
    return seconds


def is_aac(data: bytes) -> bool:
    """Whether it is AAC in ADTS: its sync looks like that of MP3, but names no layer (ISO 13818-7, 6.2)."""
    at = tag_bytes(data, 0)
    return len(data) > at + 1 and data[at] == 0xFF and data[at + 1] & 0xF6 == 0xF0


# ── Ogg Opus: pages (RFC 3533) of packets (RFC 6716, section 3.1; RFC 7845) ──────────────────────────────────────

OPUS_RATE = 48_000
SILK_MS, HYBRID_MS, CELT_MS = (10, 20, 40, 60), (10, 20), (2.5, 5, 10, 20)
OGG_PAGE = b"OggS\0"
IS_CONTINUED, IS_FIRST_PAGE, IS_LAST_PAGE = 1, 2, 4
NO_PACKET_ENDS = -1


def opus_packet_s(packet: bytes) -> float:
    """The seconds of a packet, by its first two bytes."""
    config, code = packet[0] >> 3, packet[0] & 3
    frame_ms = SILK_MS[config % 4] if config < 12 else HYBRID_MS[config % 2] if config < 16 else CELT_MS[config % 4]
    frames = (1, 2, 2)[code] if code < 3 else packet[1] & 0x3F if len(packet) > 1 else 0
    return frame_ms * frames / 1000


def ogg_pages(data: bytes) -> Iterator[tuple[int, int, list[bytes]]]:
    """Each page's flags and position, and the beginnings of the packets that end in it. One that is cut is left out."""
    at, packet = data.find(OGG_PAGE), b""
    while at >= 0 and at + 27 <= len(data):
        flags, position, count = struct.unpack_from("<Bq12xB", data, at + 5)
        segments = data[at + 27 : at + 27 + count]
        begins, is_inside, packets = at + 27 + count, bool(flags & IS_CONTINUED), []
        if begins + sum(segments) > len(data):
            return
        for size in segments:
            if not is_inside:
                packet = data[begins : begins + min(size, 32)]
            begins, is_inside = begins + size, size == 255
            if packet and not is_inside:
                packets.append(packet)
                packet = b""
        yield flags, position, packets
        at = data.find(OGG_PAGE, begins)


def opus_page_s(flags: int, packets: list[bytes]) -> float:
    """The seconds of a page's packets; below zero what players skip, as a stream's first page says."""
    if not flags & IS_FIRST_PAGE:
        return sum(opus_packet_s(packet) for packet in packets if not packet.startswith(b"OpusTags"))
    if not packets or not packets[0].startswith(b"OpusHead") or len(packets[0]) < 12:
        raise unusable("Ogg, but not Opus")
    return -int.from_bytes(packets[0][10:12], "little") / OPUS_RATE


def walk_opus(data: bytes) -> float:
    """The seconds of all packets of all streams, without what players skip at both ends of each."""
    seconds, before, patience = 0.0, 0, Patience(MAX_FRAMES, TOO_LONG)
    for flags, position, packets in ogg_pages(data):
        patience.spend(1 + len(packets))
        page_s = opus_page_s(flags, packets)
        if flags & IS_LAST_PAGE and 0 < (position - before) / OPUS_RATE < page_s:
            page_s = (position - before) / OPUS_RATE
        before = before if position == NO_PACKET_ENDS else position
        seconds += page_s
        if seconds > MAX_SOUND_S:
            break
    return seconds


# ── FLAC: frames (RFC 9639, section 9) ───────────────────────────────────────────────────────────────────────────

FLAC_MARK, STREAMINFO_BYTES = b"fLaC", 34
# A header, or a frame: its size and rate aren't forbidden, nor its channels.
FLAC_SYNC = re.compile(
    rb"fLaC[\x00\x80]\x00\x00\x22"
    rb"|\xff[\xf8\xf9][^\x00-\x0f\x1f\x2f\x3f\x4f\x5f\x6f\x7f\x8f\x9f\xaf\xbf\xcf\xdf\xef\xff][\x00-\xaf]"
)
UNCOMMON_SIZE_BYTES, UNCOMMON_RATE_BYTES = {6: 1, 7: 2}, {12: 1, 13: 2, 14: 2}


def crc_8_of(value: int) -> int:
    for _ in range(8):
        value = (value << 1 ^ 0x07) & 0xFF if value & 0x80 else value << 1
    return value


CRC_8 = bytes(map(crc_8_of, range(256)))


def coded_number(data: bytes, at: int) -> tuple[int, int] | None:
    """A number in the form of UTF-8, and where it ends (RFC 9639, section 9.1.5)."""
    first = data[at]
    more = 0 if first < 0x80 else 8 - (first ^ 0xFF).bit_length() - 1
    if more < 0 or more > 6 or (first >= 0x80 and more == 0):
        return None
    number = first if not more else first & (0x3F >> more)
    for byte in data[at + 1 : at + 1 + more]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    return number, at + 1 + more


def flac_frame_at(data: bytes, at: int) -> tuple[int, int] | None:
    """The number and the samples of the frame that begins here; None if its header's checksum is another."""
    header = data[at : at + 17]
    if len(header) < 6 or not (numbered := coded_number(header, 4)):
        return None
    number, end = numbered
    size_code, rate_code = header[2] >> 4, header[2] & 15
    extra = UNCOMMON_SIZE_BYTES.get(size_code, 0)
    if extra:
        samples = int.from_bytes(header[end : end + extra], "big") + 1
    else:
        samples = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    end += extra + UNCOMMON_RATE_BYTES.get(rate_code, 0)
    check = 0
    for byte in header[:end]:
        check = CRC_8[check ^ byte]
    return (number, samples) if header[end : end + 1] == bytes([check]) else None


SAMPLE_COUNT_BITS = 36


def with_sample_count(data: bytes, samples: int) -> bytes:
    """The same FLAC with its count of samples, which servers that stream leave out."""
    at = data.find(FLAC_MARK) + 18  # rate, channels and depth, then the count, in 64 bits
    numbers = int.from_bytes(data[at : at + 8], "big")
    true = numbers >> SAMPLE_COUNT_BITS << SAMPLE_COUNT_BITS | samples
    return data if true == numbers else data[:at] + true.to_bytes(8, "big") + data[at + 8 :]


def walk_flac(data: bytes) -> tuple[bytes, float]:
    """The FLAC with its count of samples, and its duration. The frames of joined files are counted too."""
    seconds, streams, rate, expected, counted = 0.0, 0, 0, 0, 0
    # A frame takes longer to read than those of other formats, and has more samples.
    patience, frames_left = Patience(), Patience(MAX_FRAMES // 2, TOO_LONG)
    for found in FLAC_SYNC.finditer(data):
        at = found.start()
        if found[0].startswith(FLAC_MARK):
            rate, expected, streams = int.from_bytes(data[at + 18 : at + 21], "big") >> 4, 0, streams + 1
        elif rate and (frame := flac_frame_at(data, at)) and frame[0] == expected:
            is_by_sample = data[at + 1] & 1
            expected += frame[1] if is_by_sample else 1
            seconds, counted = seconds + frame[1] / rate, counted + frame[1]
            frames_left.spend()
            continue
        patience.spend()
        if seconds > MAX_SOUND_S:
            break
    return (with_sample_count(data, counted) if streams == 1 else data), seconds


# ── any of them ──────────────────────────────────────────────────────────────────────────────────────────────────


def walk(data: bytes) -> tuple[bytes, float, str]:
    """The sound, its seconds and its format."""
    if RIFF.match(data):
        return *walk_wav(data), "wav"
    if data.startswith(b"OggS"):
        return data, walk_opus(data), "opus"
    if data.startswith(FLAC_MARK):
        return *walk_flac(data), "flac"
    if is_aac(data):
        raise unusable("it is AAC, which isn't supported")
    return data, walk_mp3(data), "mp3"


def inspect_sound(data: bytes) -> tuple[bytes, float, str]:
    """The sound with a true header, its duration in seconds, and its format.

    Raises:
        FailJob: it isn't a WAV, MP3, Ogg Opus or FLAC, or has no duration.
    """
    if not data:
        raise FailJob("an empty sound", NO_SOUND)
    try:
        sound, seconds, form = walk(data)
    except (struct.error, IndexError, OverflowError) as error:
        raise unusable(type(error).__name__) from None
    if not 0 < seconds <= MAX_SOUND_S or round(seconds, 2) == 0:
        raise unusable("it has no duration")
    return sound, round(seconds, 2), form
