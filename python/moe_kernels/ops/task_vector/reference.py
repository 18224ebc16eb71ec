"""Task vectors in plain PyTorch: the specification."""

import torch
from torch import Tensor

from moe_kernels.ops.task_vector.packed import (
    BLOCK,
    DTYPE_OF,
    DTYPES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_DIMS,
    PATCH,
    SPARE_BYTES,
    TERNARY,
    VALUES,
    PackedDelta,
    read_header,
)
from moe_kernels.ops.task_vector.ternary import TernaryDelta

Delta = TernaryDelta | PackedDelta

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of task vectors on a weight of ``dtype`` run in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, as signed integers of the same size."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def terms(delta: Delta) -> tuple[Tensor, Tensor]:
    """t, and which elements the vector has."""
    if isinstance(delta, PackedDelta) and delta.values is None:
        delta = TernaryDelta(unpack_ternary(delta.data.cpu()).to(delta.device), delta.shape)
    if isinstance(delta, TernaryDelta):
        signs = delta.signs()
        return signs, signs != 0
    planes, t = unpack_values(delta.data.cpu())
    signs = TernaryDelta(planes, delta.shape).signs()
    return t.view(delta.shape).to(delta.device), (signs != 0).to(delta.device)


def sum_deltas(deltas: list[Delta], values: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``s = sum_i value_i t_i`` in order, each product rounded, and where any t is not zero."""
    total = torch.zeros(deltas[0].shape, dtype=dtype, device=deltas[0].device)
    touched = torch.zeros_like(total, dtype=torch.bool)
    for delta, value in zip(deltas, values, strict=True):
        t, has = terms(delta)
        total += t.to(dtype) * torch.tensor(value, dtype=dtype)  # of signs the product is exact
        touched |= has
    return total, touched


def apply_(weight: Tensor, deltas: list[Delta], values: list[float]) -> None:
    total, touched = sum_deltas(deltas, values, accumulator(weight.dtype))
    changed = (weight.to(total.dtype) + total).to(weight.dtype)
    weight.copy_(torch.where(touched & ~weight.isnan(), changed, weight))


def apply_undoable_(weight: Tensor, deltas: list[Delta], values: list[float]) -> tuple[Tensor, Tensor]:
    """And what takes it back: per touched element in order of position, 0 where the bits of W are those of
    C = round(W' - s), 1 or -1 where they are one more or less, 2 where they are the next of the second tensor."""
    before = weight.clone()
    apply_(weight, deltas, values)
    total, touched = sum_deltas(deltas, values, accumulator(weight.dtype))
    back = (weight.to(total.dtype) - total).to(weight.dtype)
    steps = bits(before)[touched].long() - bits(back)[touched].long()
    steps[before[touched].isnan()] = 0
    codes = torch.where((steps >= -1) & (steps <= 1), steps, 2).to(torch.int8)  # abs of the least integer is itself
    return codes, before[touched][codes == 2]


def unapply_(weight: Tensor, deltas: list[Delta], values: list[float], codes: Tensor, kept: Tensor) -> None:
    total, touched = sum_deltas(deltas, values, accumulator(weight.dtype))
    back = (weight.to(total.dtype) - total).to(weight.dtype)[touched]
    restored = (bits(back) + torch.where(codes == 2, 0, codes)).view(weight.dtype)
    restored[codes == 2] = kept
    restored = torch.where(weight[touched].isnan(), weight[touched], restored)
    weight[touched] = restored


def differences(tensor: Tensor, base: Tensor | None) -> Tensor:
    """``tensor - base`` in float32, by float64 where both are that."""
    if tensor.dtype == torch.float64:
        return (tensor if base is None else tensor - base).float()
    return tensor.float() if base is None else tensor.float() - base.float()


def _magnitudes(tensor: Tensor, base: Tensor | None) -> Tensor:
    """[numel] int32: the bits of |t|, in the order of |t|."""
    return differences(tensor, base).reshape(-1).view(torch.int32) & 0x7FFFFFFF


def count_magnitudes(tensor: Tensor, base: Tensor | None, prefix: int) -> Tensor:
    magnitudes = _magnitudes(tensor, base)
    if prefix < 0:
        return torch.bincount(magnitudes >> 15, minlength=2**16)
    return torch.bincount(magnitudes[magnitudes >> 15 == prefix] & (2**15 - 1), minlength=2**15)


def count_window(tensor: Tensor, base: Tensor | None, first: int, last: int) -> Tensor:
    """``count_magnitudes`` of the high halves; those outside of [first, last] may be summed up in the bins beside."""
    return count_magnitudes(tensor, base, -1)


def delta_moments(tensor: Tensor, base: Tensor | None) -> Tensor:
    t = differences(tensor, base).double()
    return torch.stack((t.sum(), (t * t).sum()))


def select_ternary(tensor: Tensor, base: Tensor | None, threshold: int, num_ties: int) -> Tensor:
    magnitudes = _magnitudes(tensor, base)
    same = magnitudes == threshold
    keep = (magnitudes > threshold) | (same & (same.cumsum(0) <= num_ties))
    return TernaryDelta.from_signs(differences(tensor, base).reshape(-1).sign() * keep).planes


def end_of_ties(tensor: Tensor, base: Tensor | None, threshold: int, num_ties: int) -> int:
    """The index after the ``num_ties``-th element whose magnitude has just these bits."""
    return int((_magnitudes(tensor, base) == threshold).nonzero()[num_ties - 1]) + 1


def pack_ternary(planes: Tensor, shape: list[int], scale: float, sigma: float, base_hash: int) -> Tensor:
    """The packed format, written bit by bit as docs/task_vector_format.md says."""
    signs = TernaryDelta(planes, shape).signs().view(-1).tolist()
    return _pack(TERNARY, None, signs, shape, scale, sigma, base_hash, lambda block: b"")


def pack_values(
    planes: Tensor,
    tensor: Tensor,
    base: Tensor | None,
    shape: list[int],
    scale: float,
    sigma: float,
    base_hash: int,
    code: int,
) -> Tensor:
    signs = TernaryDelta(planes, shape).signs().view(-1)
    dtype = DTYPE_OF[code]
    magnitudes = (differences(tensor, base).reshape(-1).abs() / scale).to(dtype)

    def extra(block: int) -> bytes:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        return magnitudes[part][signs[part] != 0].view(torch.uint8).numpy().tobytes()

    return _pack(VALUES, dtype, signs.tolist(), shape, scale, sigma, base_hash, extra)


def in_order(tensor: Tensor) -> list[int]:
    """The bits as whole numbers in which neighbouring floats, and -0 and 0, differ by one."""
    pattern = bits(tensor.reshape(-1)).long()
    largest = 2 ** (8 * tensor.dtype.itemsize - 1) - 1
    return torch.where(pattern < 0, pattern ^ largest, pattern).tolist()


def make_patch(weight: Tensor, base: Tensor, shape: list[int], base_hash: int) -> Tensor:
    every = 2 ** (8 * weight.dtype.itemsize)
    steps = [(to - at + every // 2) % every - every // 2 for to, at in zip(*map(in_order, (weight, base)), strict=True)]

    def extra(block: int) -> bytes:
        sizes = [abs(step) for step in steps[block * BLOCK : (block + 1) * BLOCK] if step]
        bits = _Bits()
        for size in sizes:
            bits.put(1 << size.bit_length() - 1, size.bit_length())
        for size in sizes:
            bits.put(size - (1 << size.bit_length() - 1), size.bit_length() - 1)
        return _words(bits)

    return _pack(PATCH, weight.dtype, steps, shape, 1.0, 0.0, base_hash, extra)


def _pack(kind, dtype, signs: list[int], shape, scale: float, sigma: float, base_hash: int, extra) -> Tensor:
    """``signs`` may be any numbers that have them; extra(block): the bytes after its positions and signs."""
    blocks = [_pack_block(signs[at : at + BLOCK]) for at in range(0, len(signs), BLOCK)]
    descriptors, payload = b"", b""
    for block, (mode, k, count, stream) in enumerate(blocks):
        descriptors += (len(payload) // 4 | count << 34 | mode << 49 | k << 52).to_bytes(8, "little")
        payload += stream + (extra(block) if count else b"")
        payload = payload.ljust(-(-len(payload) // 4) * 4, b"\0")
    start = -(-(HEADER_BYTES + len(descriptors)) // 64) * 64
    dims = [*shape, *[0] * (MAX_DIMS - len(shape))]
    nnz, code = sum(sign != 0 for sign in signs), 0 if dtype is None else DTYPES[dtype]
    fields = (
        MAGIC,
        len(signs),
        12,
        len(blocks),
        scale,
        sigma,
        kind,
        0,
        start,
        nnz,
        base_hash % 2**64,
        len(shape),
        code,
    )
    whole = (HEADER.pack(*fields, *dims) + descriptors).ljust(start, b"\0") + payload
    whole = whole.ljust(-(-(len(whole) + SPARE_BYTES) // 64) * 64, b"\0")
    whole = whole[:36] + crc32c(whole).to_bytes(4, "little") + whole[40:]
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def unpack_ternary(data: Tensor) -> Tensor:
    """Planes of a packed ternary vector. Raises ValueError where it is damaged."""
    return _planes(_unpack(data, lambda signs, octets, bit: signs))


def unpack_values(data: Tensor) -> tuple[Tensor, Tensor]:
    """Planes, and t in float32."""
    dtype = read_header("decompress", data).dtype

    def read(signs: list[int], octets: bytes, bit: int) -> list[tuple[int, float]] | None:
        begin, count = -(-bit // 32) * 4, sum(map(abs, signs))
        held = octets[begin : begin + count * dtype.itemsize]
        if len(held) < count * dtype.itemsize:
            return None
        magnitudes = torch.frombuffer(bytearray(held), dtype=dtype).float() if held else torch.empty(0)
        if not bool(((magnitudes >= 0) & (magnitudes <= 1)).all()):
            return None
        following = iter(magnitudes.tolist())
        return [(sign, sign * next(following) if sign else 0.0) for sign in signs]

    found = _unpack(data, read)
    t = torch.tensor([value for _, value in found], dtype=torch.float32)
    return _planes([sign for sign, _ in found]), t


def apply_patch(weight: Tensor, data: Tensor, back: bool) -> None:
    at, every = in_order(weight), 2 ** (8 * weight.dtype.itemsize)
    steps = _unpack(data, _reader_of_steps(weight.dtype))
    moved = [(a - step if back else a + step) + every // 2 for a, step in zip(at, steps, strict=True)]
    signed = torch.tensor([a % every - every // 2 for a in moved], dtype=torch.int64)
    pattern = torch.where(signed < 0, signed ^ (every // 2 - 1), signed)
    weight.copy_(pattern.to(bits(weight).dtype).view(weight.dtype).view(weight.shape))


def check_patch(data: Tensor) -> None:
    _unpack(data, _reader_of_steps(read_header("decompress", data).dtype))


def _reader_of_steps(dtype: torch.dtype):
    def read(signs: list[int], octets: bytes, bit: int) -> list[int] | None:
        at, end = -(-bit // 32) * 32, 8 * len(octets)
        stream, lows = int.from_bytes(octets, "little"), []
        for _ in range(sum(map(abs, signs))):
            low = 0
            while at < end and not stream >> at & 1:
                low, at = low + 1, at + 1
            at += 1
            if at > end or low >= 8 * dtype.itemsize:
                return None
            lows.append(low)
        if at + sum(lows) > end:
            return None
        sizes = []
        for low in lows:
            sizes.append(1 << low | stream >> at & (1 << low) - 1)
            at += low
        following = iter(sizes)
        return [sign * next(following) if sign else 0 for sign in signs]

    return read


def _planes(signs: list[int]) -> Tensor:
    return TernaryDelta.from_signs(torch.tensor(signs, dtype=torch.int8)).planes


def _unpack(data: Tensor, read) -> list:
    """read(signs, bytes of the payload from the block on, bit after its signs) of all blocks, which gives one entry for
    each element, or None where the block is damaged."""
    whole = data.numpy().tobytes()
    fields = HEADER.unpack(whole[:HEADER_BYTES])
    numel, num_blocks, crc, start = fields[1], fields[3], fields[7], fields[8]
    if crc != crc32c(whole[:36] + bytes(4) + whole[40:]):
        raise ValueError("decompress: the packed task vector is damaged: its checksum does not match")
    entries: list = []
    for block in range(num_blocks):
        word = int.from_bytes(whole[HEADER_BYTES + 8 * block :][:8], "little")
        offset, count, mode, k = 4 * (word & 2**34 - 1), word >> 34 & 2**15 - 1, word >> 49 & 7, word >> 52
        octets = whole[start + offset : len(whole) - SPARE_BYTES]
        size = min(BLOCK, numel - block * BLOCK)
        decoded = None
        if count <= size and k < 12 and start + offset <= len(whole) - SPARE_BYTES:
            decoded = _unpack_block(int.from_bytes(octets, "little"), 8 * len(octets), size, count, mode, k)
        decoded = None if decoded is None else read(decoded[0], octets, decoded[1])
        if decoded is None:
            raise ValueError(f"decompress: block {block} of the packed task vector is damaged")
        entries += decoded
    return entries


class _Bits:
    """A string of bits, the first one lowest."""

    def __init__(self):
        self.value, self.count = 0, 0

    def put(self, value: int, count: int) -> None:
        self.value |= value << self.count
        self.count += count

    def rice(self, fields: list[int], width: int, highs: list[int]) -> "_Bits":
        for field in fields:
            self.put(field, width)
        for high in highs:
            self.put(1 << high, high + 1)
        return self


def _pack_block(signs: list[int]) -> tuple[int, int, int, bytes]:
    """Mode, k, count and bytes of one block: the fewest bits, of equals the first."""
    positions = [i for i, sign in enumerate(signs) if sign]
    zeros = [i for i, sign in enumerate(signs) if not sign]
    negative = [int(signs[i] < 0) for i in positions]
    count, strings = len(positions), []
    if count == 0:
        return 0, 0, 0, b""
    sign_bits = sum(bit << i for i, bit in enumerate(negative))
    if not zeros:
        bits = _Bits()
        bits.put(sign_bits, count)
        return 3, 0, count, _words(bits)
    bitmap = _Bits()
    bitmap.put(sum(1 << i for i in positions), len(signs))
    bitmap.put(sign_bits, count)
    strings.append((2, 0, bitmap))
    sparse = zeros if 2 * count > len(signs) else positions
    gaps = [at - before - 1 for before, at in zip([-1, *sparse], sparse, strict=False)]
    for k in range(12):
        mask, highs = (1 << k) - 1, [gap >> k for gap in gaps]
        if sparse is positions:
            fields = [(gap & mask) << 1 | sign for gap, sign in zip(gaps, negative, strict=True)]
            strings.append((1, k, _Bits().rice(fields, k + 1, highs)))
        else:
            rice = _Bits().rice([gap & mask for gap in gaps], k, highs)
            rice.put(sign_bits, count)
            strings.append((4, k, rice))
    mode, k, bits = min(strings, key=lambda string: string[2].count)
    return mode, k, count, _words(bits)


def _words(bits: _Bits) -> bytes:
    return bits.value.to_bytes(-(-bits.count // 32) * 4, "little")


def _unpack_block(stream: int, num_bits: int, size: int, count: int, mode: int, k: int) -> tuple | None:
    """The signs of one block and the bit after them, None where the bits are none."""

    def rice(number: int, width: int) -> tuple[list[int], list[int], int] | None:
        """Fields, positions and the bit after them."""
        fields = [stream >> i * width & (1 << width) - 1 for i in range(number)]
        at, position, positions = number * width, -1, []
        for field in fields:
            high = 0
            while at < num_bits and not stream >> at & 1:
                high, at = high + 1, at + 1
            at += 1
            position += (high << k | field >> width - k) + 1
            if position >= size or at > num_bits:
                return None
            positions.append(position)
        return fields, positions, at

    if mode == 0:
        return ([0] * size, 0) if count == 0 else None
    if mode == 1:
        found = rice(count, k + 1)
        if found is None or count == 0:
            return None
        signs = [0] * size
        for field, position in zip(found[0], found[1], strict=True):
            signs[position] = 1 - 2 * (field & 1)
        return signs, found[2]
    if mode == 2:
        marks, end = [stream >> i & 1 for i in range(size)], size
    elif mode == 3:
        marks, end = [1] * size, 0
    elif mode == 4:
        found = rice(size - count, k)
        if found is None or count == size:
            return None
        marks, end = [1] * size, found[2]
        for position in found[1]:
            marks[position] = 0
    else:
        return None
    if sum(marks) != count or end + count > num_bits:
        return None
    negative = iter([stream >> end + i & 1 for i in range(count)])
    return [mark * (1 - 2 * next(negative)) if mark else 0 for mark in marks], end + count


def crc32c(octets: bytes) -> int:
    """CRC-32C (Castagnoli), lowest bit first."""
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    crc = 0xFFFFFFFF
    for octet in octets:
        crc = crc >> 8 ^ table[(crc ^ octet) & 0xFF]
    return crc ^ 0xFFFFFFFF
