"""What do the GPU's kernels take, and how long would they: built and counted without a GPU?

    python benchmarks/kernels_ahead_of_time.py
    python benchmarks/kernels_ahead_of_time.py --archs 90 --places 16x64 --products fp16
    python benchmarks/kernels_ahead_of_time.py --prominence   # weights of words by prominence

First table: each kernel built for GPUs of some compute capabilities (80 is an A100, 89 an L40S or
an RTX 40, 90 an H100, 100 a B200), by Triton and its own ptxas, which need no GPU.

    registers, stack   of a thread; what is on the stack is spilled, or was too much for registers
    shared             memory of a program, in bytes
    loop               instructions in the body of the longest loop: of one tile
    a pair             of all warps that have the tile, divided by its captions
    tensor             those of them that are matrix products

Second table: an ESTIMATE, nothing of it is measured, of scoring 5,000 images with 25,000 captions
on an H100. Bytes are counted by sending tensors that have shapes only through the code that runs on
a GPU; what a kernel reads twice from the second cache counts once. Rates are those of RATES below.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from measure import parser_of, publish, say, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cpfean.kernels.triton_backward import regions_backward, words_backward
from cpfean.kernels.triton_forward import score_pairs
from cpfean.kernels.triton_pairs import SOFT
from cpfean.model.scorers.prominent_cuda_blocks import Inputs, Scoring, compiler_options
from cpfean.model.scorers.prominent_plan import Tile, tiles_of
from cpfean.training.evaluation import SCORED_ON_GPU

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {
    "forward": score_pairs,
    "words_backward": words_backward,
    "regions_backward": regions_backward,
}
_TENSOR = re.compile(r"[A-Z]*MMA")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What an H100 SXM does in a second, taken as known.

    Attributes:
        bytes: to and from its memory.
        products: operations of matrix products, dense, by type.
        instructions: of all warps, where each of 4 schedulers of 132 multiprocessors issues one a
            cycle.
        launch: seconds from one kernel to the next.
    """

    bytes: float = 3.0e12
    products: tuple[tuple[str, float], ...] = (("fp16", 798e12), ("bf16", 798e12), ("fp32", 50e12))
    instructions: float = 132 * 4 * 1.755e9
    launch: float = 5e-6


RATES = Rates()
# Of the cycles in which a scheduler could issue an instruction: how many it does. From all of them
# to what is usual of kernels with two programs on a multiprocessor.
ISSUED = (1.0, 0.7)


def build(
    name: str, *, arch: int, tile: Tile, products: str, prominence: bool = False
) -> dict[str, Any]:
    """Builds a kernel with soft gates; what it takes.

    Args:
        name: in `KERNELS`.
        arch: compute capability, times 10.
        tile: what a program has at a time.
        products: type of S.
        prominence: with weights of words by prominence.
    """
    kernel = KERNELS[name]
    constants = {
        "C": tile.captions,
        "L": tile.word_places,
        "R": tile.region_places,
        "GATE": SOFT.value,
        "PROMINENCE": prominence,
        "HALF": products != "fp32",
    }
    signature, values, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        signature[parameter.name] = _type_of(parameter.name, constants, products)
        if parameter.name in constants:
            values[(place,)] = constants[parameter.name]
        elif parameter.name.endswith("_ptr") and not parameter.do_not_specialize_on_alignment:
            aligned[(place,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constexprs=values, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options=compiler_options(tile),
    )
    usage, code = _disassembled(built.asm["cubin"])
    loop = _longest_loop(code)
    return {
        "kernel": name,
        "sm": arch,
        "products": products,
        "tile": f"{tile.captions} x {tile.word_places} x {tile.region_places}",
        "warps": tile.num_warps,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": built.metadata.shared,
        "loop": len(loop),
        "a pair": len(loop) * tile.num_warps // tile.captions,
        "tensor": sum(bool(_TENSOR.fullmatch(operation)) for operation in loop),
    }


def _type_of(name: str, constants: dict[str, Any], products: str) -> str:
    if name in constants:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "i32"
    grams = "fp32" if products == "fp32" else "fp16"
    own = {"S_ptr": products, "dS_ptr": products, "K_ptr": grams, "G_ptr": grams}
    own |= {"word_start_ptr": "i32", "num_regions_ptr": "i32"}
    return "*" + own.get(name, "fp32")


def _disassembled(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """What a kernel takes, by name, and the lines of its code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, file.name], capture_output=True, encoding="utf-8", check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return {name: int(value) for name, value in found.items()}, code.splitlines()


def _longest_loop(code: list[str]) -> list[str]:
    """The operations between a label and the last branch back to it."""
    labels = {
        match[1]: number
        for number, line in enumerate(code)
        if (match := re.match(r"\s*(\.L\w+):", line))
    }
    spans = [(0, 0)]
    for number, line in enumerate(code):
        if (match := re.search(r"\bBRA\S* .*\((\.L\w+)\)", line)) and labels[match[1]] < number:
            spans.append((labels[match[1]], number))
    start, end = max(spans, key=lambda span: span[1] - span[0])
    found = (
        re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)", line)
        for line in code[start : end + 1]
    )
    return [match[1] for match in found if match]


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device.type == "meta"]
        if made and not func.is_view and "empty" not in func.name():
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if "index" in func.name():  # what is picked, and not what it is picked from
                read = [*made, *read[1:]]
            self.add(func.name().split(".")[0].removeprefix("aten::"), *read, *made)
        return result

    def add(self, name: str, *tensors: Tensor) -> None:
        """An operation that has all of these tensors in its hands once."""
        self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        self.launches[name] += 1


class _CountedScoring(Scoring):
    """Goes through the blocks on shapes alone; a kernel is not run but counted."""

    def __init__(self, inputs: Inputs, traffic: _Traffic) -> None:
        self.traffic = traffic
        self.tiles: Counter[Tile] = Counter()
        super().__init__(inputs)

    def launch(
        self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], *, tile: Tile
    ) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        self.traffic.add(kernel.__name__, *tensors)
        self.tiles[tile] += grid[0] * len(tensors[1])  # K is that of each image


@dataclass(frozen=True, kw_only=True)
class Work:
    """What scoring takes.

    Attributes:
        bytes, launches: by operation.
        tiles: how often the forward kernel goes through a tile.
        flops: of the products that make S.
    """

    bytes: Counter[str]
    launches: Counter[str]
    tiles: Counter[Tile]
    flops: float


def count(
    num_images: int,
    num_words: Tensor,
    *,
    products: str,
    num_regions: int = 36,
    dim: int = 1024,
    images_each: int = SCORED_ON_GPU,
) -> Work:
    """Counts what evaluation does: captions by their lengths, so many images at a time.

    Args:
        num_words: of each caption, in rising order.
        products: type of S.
        images_each: that are scored at a time.
    """
    traffic, tiles, flops = _Traffic(), Counter[Tile](), 0.0
    for first in range(0, num_images, images_each):
        images = min(images_each, num_images - first)
        for length in num_words.unique().tolist():
            captions = int((num_words == length).sum())
            new = torch.empty(0, device="meta").new_empty
            inputs = Inputs(
                regions=new(images, num_regions, dim),
                words=new(captions, length, dim),
                num_regions=torch.full((images,), num_regions),
                num_words=torch.full((captions,), length),
                thresholds=new(images, num_regions),
                lead=new(captions, length),
                constants=new(4),
                gate="soft",
                prominence=False,  # the bytes are the same with it
                product_type=TYPES[products],
            )
            with _on_shapes(), traffic:
                scoring = _CountedScoring(inputs, traffic)
                scoring.scores()
            tiles += scoring.tiles
            slots = -(-num_regions // 8) * 8
            flops += 2.0 * images * slots * captions * length * dim
    return Work(bytes=traffic.bytes, launches=traffic.launches, tiles=tiles, flops=flops)


@contextmanager
def _on_shapes() -> Iterator[None]:
    """Without gradients; a tensor of shapes has none."""
    with torch.no_grad():
        yield


def estimate(work: Work, instructions: dict[Tile, int], *, products: str) -> dict[str, Any]:
    """Seconds on an H100, from counts and `RATES`.

    Args:
        work: what is done.
        instructions: of all warps, in the loop of the forward kernel, for a tile.
        products: type of S.
    """
    rate = dict(RATES.products)[products]
    product = max(work.flops / rate, work.bytes["mm"] / RATES.bytes)
    issued = sum(times * instructions[tile] for tile, times in work.tiles.items())
    kernel = [
        max(issued / (RATES.instructions * share), work.bytes["score_pairs"] / RATES.bytes)
        for share in ISSUED
    ]
    others = sum(size for name, size in work.bytes.items() if name not in ("mm", "score_pairs")) / (
        RATES.bytes
    )
    launches = sum(work.launches.values())
    return {
        "products": products,
        "TB": sum(work.bytes.values()) / 1e12,
        "product, s": product,
        "kernel, s": f"{kernel[0]:.2f} to {kernel[1]:.2f}",
        "others, s": others,
        "launches": launches,
        "launches alone, s": launches * RATES.launch,
        "ESTIMATE, s": " to ".join(
            f"{max(product + one + others, launches * RATES.launch):.2f}" for one in kernel
        ),
    }


LENGTHS = {
    "13 words": lambda n: torch.full((n,), 13),
    "8 to 20 words, as many of each": lambda n: torch.linspace(8, 20.999, n).long(),
}


def main() -> None:
    parser = parser_of(__doc__, "kernels_ahead_of_time")
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 89, 90, 100])
    parser.add_argument("--products", nargs="+", choices=TYPES, default=["fp16", "bf16", "fp32"])
    parser.add_argument(
        "--places",
        nargs="+",
        default=["16x64", "32x64", "16x128"],
        help="word places x region places of a tile (16x64 32x64 16x128)",
    )
    parser.add_argument("--images", type=int, default=5000, help="0 for no estimate (5000)")
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument(
        "--prominence",
        action="store_true",
        help="with weights of words by prominence, as the ablation prominent_words_weigh_more",
    )
    arguments = parser.parse_args()
    if not isinstance(score_pairs, JITFunction):
        parser.error("TRITON_INTERPRET is set: nothing is built. Run it with TRITON_INTERPRET=0.")
    rows = []
    for products in arguments.products:
        for places in arguments.places:
            words, regions = map(int, places.split("x"))
            for name, tile in tiles_of(words, regions, width=TYPES[products].itemsize).items():
                for arch in arguments.archs:
                    say(f"  {name} {products} {places} for sm_{arch}")
                    rows.append(
                        build(
                            name,
                            arch=arch,
                            tile=tile,
                            products=products,
                            prominence=arguments.prominence,
                        )
                    )
    estimates = arguments.images and [
        {"captions": name, **one}
        for name in LENGTHS
        for products in arguments.products
        if (
            one := _estimate(
                arguments.images,
                LENGTHS[name](arguments.captions),
                products=products,
                prominence=arguments.prominence,
            )
        )
    ]
    publish(arguments.output, rows, estimates=estimates or [])
    if not estimates:
        return
    print(
        f"\nESTIMATE, not measured, of {arguments.images:,} x {arguments.captions:,} on one H100:\n"
    )
    print(table(estimates))
    print(
        f"\nproduct = max(operations / rate, bytes / {RATES.bytes:.1e}); kernel = instructions of "
        f"its loop / ({RATES.instructions:.2e} a second x {' to '.join(map(str, ISSUED))});\n"
        f"others = bytes / {RATES.bytes:.1e}; launches at {RATES.launch:.0e} s run ahead of them."
    )


def _estimate(
    num_images: int, num_words: Tensor, *, products: str, prominence: bool
) -> dict[str, Any]:
    work = count(num_images, num_words, products=products)
    instructions = {}
    for tile in work.tiles:
        built = build("forward", arch=90, tile=tile, products=products, prominence=prominence)
        instructions[tile] = built["loop"] * tile.num_warps
    return estimate(work, instructions, products=products)


if __name__ == "__main__":
    main()
