"""From counts to microseconds: the floor of a launch, and what is predicted for it. Arithmetic; nothing was measured on a GPU.

floor       max(distinct bytes of the tensors / bandwidth, floating-point operations / peak)
predicted   max(memory, issue, L1, tensor cores) over the blocks of the grid, plus launch and ramp

The bandwidth is the specified one in both, so that what DRAM itself does not reach (a tenth or so) drops out of their ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST_RATIO, MOST_ISSUE = 1.1, 0.5  # limits: predicted by floor, and share of the issue slots in the time that the bytes take


@dataclass(frozen=True)
class Chip:
    """A GPU. flight_kb: bytes in flight of a multiprocessor that saturate the memory; share: of the tensor cores' peak that
    `mma.sync` reaches; l2_tbs; launch_us: a kernel behind another in a stream; ramp_us: first loads, last stores: estimates.
    """

    name: str
    arch: str
    bandwidth_tbs: float
    processors: int
    clock_ghz: float
    tflops: float  # dense fp16 with fp32 sums
    tflops_fp32: float  # without tensor cores
    shared_kb: int  # of a multiprocessor
    flight_kb: float
    share: float
    l2_tbs: float
    launch_us: float = 1.5
    ramp_us: float = 0.7

    @property
    def bytes_per_us(self) -> float:
        return self.bandwidth_tbs * 1e6

    @property
    def issue_per_us(self) -> float:
        """Warp instructions of all multiprocessors: four schedulers, one instruction a clock each."""
        return 4 * self.processors * self.clock_ghz * 1e3

    @property
    def slots_per_512(self) -> float:
        """Warp instructions that can be issued while memory moves 512 bytes."""
        return self.issue_per_us * 512 / self.bytes_per_us


CHIPS = (
    Chip("A100 SXM 80 GB", "80", 2.04, 108, 1.41, 312, 19.5, 164, flight_kb=40, share=1.0, l2_tbs=4.5),
    Chip("H100 SXM", "90", 3.35, 132, 1.76, 989, 66.9, 228, flight_kb=64, share=0.62, l2_tbs=5.5),
)


def resident_blocks(chip: Chip, threads: int, registers: int, shared: int) -> int:
    """Blocks of a multiprocessor at once: 64 warps, 32 blocks, 64 Ki registers (256 a warp at a time), shared memory."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = chip.shared_kb * 1024 // (shared + 1024)
    return max(1, min(64 // warps, 32, by_registers, by_shared))


def instructions_per_vector(row: dict[str, Any], arch: str) -> float:
    """Machine instructions of a warp for each vector of x. Where the count of accesses is not the simulator's within 5 %, the
    larger of this and the PTX instructions.
    """
    counts = row["counts"]
    sass, ptx = counts[f"sass{arch}"]["per_vector"], counts["ptx"]["per_vector"]
    agreed = abs(counts[f"wide{arch}"]["per_vector"] / counts["wide"]["per_vector"] - 1) <= 0.05
    return sass if agreed else max(sass, ptx)


def issue_share(row: dict[str, Any], chip: Chip) -> float:
    """Of the issue slots, in the time that the bytes of the main loop take."""
    return instructions_per_vector(row, chip.arch) * 512 / row["stream_bytes_per_vector"] / chip.slots_per_512


def spread(chip: Chip, blocks: int, resident: int, flight_of_block: float, wanted: float) -> float:
    """How much longer a grid takes than at full bandwidth: blocks fill the chip in waves, the last one may not saturate it.

    flight_of_block: bytes that one block has under way; wanted: bytes of a multiprocessor that saturate the memory here.
    """

    def slowness(per_processor: float) -> float:
        return max(1.0, wanted / (per_processor * flight_of_block))

    at_once = chip.processors * resident
    waves, rest = divmod(blocks, at_once)
    full = waves * at_once * slowness(resident)
    last = rest * slowness(rest / chip.processors) if rest else 0.0
    return (full + last) / blocks


def streaming(row: dict[str, Any], chip: Chip, elements: int, blocks: int, small_bytes: float) -> dict[str, float]:
    """One launch of a kernel that reads and writes whole tensors (bn_act, add_act). Times in microseconds."""
    size = {"float16": 2, "bfloat16": 2, "float32": 4}[row["dtype"]]
    facts, counts, vectors, warps = row["facts"][chip.arch], row["counts"], elements * size / 512, blocks * 8
    bytes_ = row["stream_bytes_per_vector"] * vectors
    floor = bytes_ / chip.bytes_per_us
    resident = resident_blocks(chip, 256, facts["registers"], facts["shared"])
    wanted = 1024 * chip.flight_kb * row["stream_read_share"]
    slow = spread(chip, blocks, resident, 8 * 512 * max(1, row["flight"][chip.arch]), wanted)
    memory = (bytes_ + small_bytes) / chip.bytes_per_us * slow
    setup = max(0.0, counts[f"sass{chip.arch}"]["per_warp"]) * warps
    issue = (instructions_per_vector(row, chip.arch) * vectors + setup) / chip.issue_per_us
    moved = counts["moved"]["per_vector"] * vectors + max(0.0, counts["moved"]["per_warp"]) * warps
    l1 = moved / (64 * chip.processors * chip.clock_ghz * 1e3)  # 64 bytes a clock and multiprocessor
    predicted = max(memory, issue, l1) + chip.launch_us + chip.ramp_us
    return {
        "floor_us": floor, "predicted_us": predicted, "memory_us": memory, "issue_us": issue, "l1_us": l1, "resident": resident,
        "flight_kb": resident * 8 * 512 * max(1, row["flight"][chip.arch]) / 1024, "wanted_kb": wanted / 1024,
        "slow": slow, "bytes": bytes_, "moved": moved,
    }  # fmt: skip


def finalize(chip: Chip, parts: int, bytes_: float) -> float:
    """Merging partial results: groups of 64 threads read them four at a time, one round trip to memory after another."""
    rounds = (parts + 255) // 256 + 2
    return chip.launch_us + chip.ramp_us * rounds + bytes_ / chip.bytes_per_us


def product(chip: Chip, facts: dict[str, Any], blocks: int, total: dict[str, float], distinct: float, flops: float,
            again: float = 0.0) -> dict[str, float]:  # fmt: skip
    """A kernel on tensor cores from its counts (PTX instructions; machine instructions are not counted here).

    total: counts of the whole grid; distinct: bytes of all operands; again: bytes that move and are not among the counted.
    """
    floor = max(distinct / chip.bytes_per_us, flops / (chip.tflops * 1e6))
    resident = resident_blocks(chip, facts["threads"], facts["registers"], facts["shared"])
    times = {
        "tensor_us": total["mma"] * 4096 / (chip.tflops * 1e6 * chip.share), "issue_us": total["ptx"] / chip.issue_per_us,
        "shared_us": total["waves"] / (chip.processors * chip.clock_ghz * 1e3), "memory_us": distinct / chip.bytes_per_us,
        "l2_us": (total["moved"] + again) / (chip.l2_tbs * 1e6),
    }  # fmt: skip
    # The multiprocessor with most blocks decides: whole waves, and a last one that leaves some idle.
    deepest = -(-blocks // chip.processors) * chip.processors / blocks
    inside = max(times["tensor_us"], times["issue_us"], times["shared_us"]) * deepest
    body = max(inside, times["memory_us"], times["l2_us"])
    bound = max({**times, "tensor_us": times["tensor_us"] * deepest}.items(), key=lambda item: item[1])[0].removesuffix("_us")
    return {
        "floor_us": floor, "predicted_us": body + chip.launch_us + chip.ramp_us, "blocks": blocks, "resident": resident,
        "waves": blocks / (resident * chip.processors), "tflops": flops / (body + chip.launch_us + chip.ramp_us) / 1e6,
        "intensity": flops / distinct, "bound": bound, **times,
    }  # fmt: skip


def convolution(tile: dict[str, Any], chip: Chip, rows: int, columns: int, channels: int, taps: int, input_elements: int,
                maps: float, again: float = 0.0) -> dict[str, float]:  # fmt: skip
    """An fp16 convolution, or the gradient of one, with one tile. maps: of the output's size that are read and written;
    again: how many of these the counted launch did not have.
    """
    blocks = -(-rows // tile["pixels"]) * -(-columns // tile["outputs"])
    steps = -(-channels // 32) * taps
    total = {name: blocks * (tile["per_block"][name] + steps * tile["per_step"][name]) for name in tile["per_step"]}
    out = 2.0 * rows * columns
    distinct = 2.0 * (input_elements + channels * taps * columns) + out * maps
    flops = 2.0 * rows * columns * channels * taps
    return product(chip, tile["facts"][chip.arch], blocks, total, distinct, flops, again * out)


def block_end(counts: dict[str, Any], chip: Chip, rows: int, columns: int, channels: int, taps: int, input_elements: int,
              parts: int) -> dict[str, float]:  # fmt: skip
    """The end of a bottleneck block in fp16, with a residual: two products of 64 pixels a block, `parts` blocks a tile."""
    middle = 64
    blocks = -(-rows // 64) * parts
    steps, chunks = -(-channels // 32) * taps, -(-columns // (64 * parts))
    total = {
        name: blocks * (counts["per_block"][name] + steps * counts["per_step"][name] + chunks * counts["per_chunk"][name])
        for name in counts["per_step"]
    }
    distinct = 2.0 * (input_elements + channels * taps * middle + middle * columns) + 4.0 * rows * columns
    flops = 2.0 * rows * middle * (channels * taps + columns)
    return product(chip, counts["facts"][chip.arch], blocks, total, distinct, flops)
