"""Chunks of tensors into files and back, for any rectangles; what damage of a file or a description is reported as."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_prime.checkpoint.torch_dist import (
    COMMON_FILE,
    CONFIG_FILE,
    METADATA_FILE,
    StoredChunk,
    WrittenFile,
    file_name,
    one_line,
    read_chunks,
    read_description,
    write_chunks,
    write_description,
)
from megatron_prime.errors import CheckpointError

WHOLE = torch.arange(60, dtype=torch.float32).view(10, 6)
ROWS = ((0, 4), (4, 5), (5, 10))


def write(folder: Path) -> list[WrittenFile]:
    """WHOLE as two ranks would write it: rows of three sizes, and a scalar in bfloat16."""
    parts = [StoredChunk("w", (10, 6), (start, 0), WHOLE[start:stop].clone()) for start, stop in ROWS]
    scalar = StoredChunk("step", (), (), torch.tensor(3.0, dtype=torch.bfloat16))
    files = [
        write_chunks(folder / file_name(0), parts[:2]),
        write_chunks(folder / file_name(1), [parts[2], scalar]),
    ]
    write_description(folder, [chunk for file in files for chunk in file.chunks], {"iteration": 7})
    return files


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((0, 0), (10, 6)), ((3, 2), (4, 3)), ((4, 5), (1, 1)), ((9, 0), (1, 6))]
)
def test_any_rectangle_is_read_across_chunks_and_files(
    tmp_path: Path, offsets: tuple[int, int], sizes: tuple[int, int]
) -> None:
    write(tmp_path)
    target = torch.full(sizes, -1.0)
    step = torch.zeros((), dtype=torch.float32)
    wanted = [StoredChunk("w", (10, 6), offsets, target), StoredChunk("step", (), (), step)]
    read_chunks(tmp_path, read_description(tmp_path), wanted)
    top, left = offsets
    assert torch.equal(target, WHOLE[top : top + sizes[0], left : left + sizes[1]])
    assert step.item() == 3.0


def test_what_reaches_beyond_the_stored_tensor_stays_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    padded = torch.full((12, 6), 0.5)
    read_chunks(tmp_path, read_description(tmp_path), [StoredChunk("w", (10, 6), (0, 0), padded)])
    assert torch.equal(padded, torch.cat([WHOLE, torch.full((2, 6), 0.5)]))


def test_records_say_what_lies_on_the_disk(tmp_path: Path) -> None:
    for file in write(tmp_path):
        content = (tmp_path / file.name).read_bytes()
        assert (file.record.num_bytes, file.record.crc32) == (len(content), zlib.crc32(content))
        assert sum(chunk.length for chunk in file.chunks) == len(content)
    assert torch.load(tmp_path / COMMON_FILE) == {"iteration": 7}


@pytest.mark.parametrize("rows", [((0, 4), (5, 10)), ((0, 6), (5, 10))], ids=["hole", "overlap"])
def test_parts_that_do_not_make_a_whole_are_refused(tmp_path: Path, rows: Sequence[tuple[int, int]]) -> None:
    parts = [StoredChunk("w", (10, 6), (start, 0), WHOLE[start:stop].clone()) for start, stop in rows]
    file = write_chunks(tmp_path / file_name(0), parts)
    with pytest.raises(CheckpointError, match=r"the parts of w do not make a whole of \(10, 6\)"):
        write_description(tmp_path, file.chunks, {})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / CONFIG_FILE).unlink(), "is no Megatron distributed checkpoint"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "no checkpoint, or a damaged one"),
        (lambda folder: (folder / METADATA_FILE).write_bytes(b"\x80"), "no checkpoint, or a damaged one"),
        (lambda folder: (folder / METADATA_FILE).unlink(), "no checkpoint, or a damaged one"),
        (
            lambda folder: (folder / CONFIG_FILE).write_text(json.dumps({"sharded_backend": "zarr"})),
            "says .*zarr.*, only .*torch_dist.* is read",
        ),
    ],
    ids=["no configuration", "half a configuration", "half a description", "no description", "another format"],
)
def test_a_folder_without_a_readable_description_is_refused(tmp_path: Path, harm, message: str) -> None:
    write(tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_description(tmp_path)


def test_a_damaged_data_file_is_named_with_the_tensor(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = read_description(tmp_path)
    wanted = [StoredChunk("w", (10, 6), (5, 0), torch.zeros(5, 6))]
    path = tmp_path / file_name(1)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"damaged: w in __1_0\.distcp"):
        read_chunks(tmp_path, metadata, wanted)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"damaged: __1_0\.distcp: No such file"):
        read_chunks(tmp_path, metadata, wanted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_of_the_disk() -> None:
    """torch's archive writer would report only that it could not finish."""
    with pytest.raises(OSError, match="No space left on device"):
        write_chunks(Path("/dev/full"), [StoredChunk("w", (2**16,), (0,), torch.zeros(2**16))])


def test_the_first_line_of_an_error_stands_for_it() -> None:
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(EOFError()) == "EOFError"
