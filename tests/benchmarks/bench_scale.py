"""What several machines read, send, hold and take, by arithmetic from measured rates: the tables of docs/scale.md.

    python tests/benchmarks/bench_scale.py [--rates docs/bench_scale.json] [--tokens 65536] [--batch 512] [--machines 1,4,16]

rates: what tests/benchmarks/bench_block.py measured on one machine, for two blocks, and the speed of network and disk, which
are assumed. One process a machine. Work is counted in multiply-adds: of a forward one a weight and token, of the statistics
K (K + 1) / 2 for each row of an input with K channels. The search takes a time for each weight, and one that also grows with the
channels of its input, over which the losses are summed: what two blocks of different width took tells both.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RATES = Path(__file__).resolve().parents[2] / "docs" / "bench_scale.json"
_FLOAT = 2  # bytes of a weight, and of an activation: bfloat16
_INT4 = 0.5 + 3 / 128  # bytes of a weight: a code, and its share of a group's bfloat16 scale and uint8 zero
_MOMENT = 4  # bytes of an entry of a second moment


@dataclass(frozen=True)
class Model:
    """blocks: how many there are. linears: of a block, [out, in, copies in it, copies that a token reaches].

    inputs: that Linears read, [channels, copies, copies that a token reaches].
    """

    name: str
    blocks: int
    hidden: int
    linears: tuple[tuple[int, int, int, int], ...]
    inputs: tuple[tuple[int, int, int], ...]

    @property
    def weights(self) -> int:
        """Weights of a block."""
        return sum(out * width * copies for out, width, copies, _ in self.linears)

    @property
    def forward(self) -> int:
        """Multiply-adds of a token."""
        return sum(out * width * reached for out, width, _, reached in self.linears)

    @property
    def products(self) -> int:
        """Of each weight with all channels of its input: what a loss takes of all weights of a block."""
        return sum(out * width * width * copies for out, width, copies, _ in self.linears)

    @property
    def statistics(self) -> int:
        """Multiply-adds of a token."""
        return sum(width * (width + 1) // 2 * reached for width, _, reached in self.inputs)

    @property
    def input_bytes(self) -> int:
        """Bytes of all that a token brings to the inputs of a block."""
        return sum(_FLOAT * width * reached for width, _, reached in self.inputs)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of a block's statistics."""
        return sum(_MOMENT * width * width * copies for width, copies, _ in self.inputs)


def llama(name: str, blocks: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head: int) -> Model:
    """A dense model of Llama's kind."""
    q, kv = heads * head, kv_heads * head
    attention = ((q + 2 * kv, hidden, 1, 1), (hidden, q, 1, 1))
    return Model(
        name,
        blocks,
        hidden,
        (*attention, (2 * intermediate, hidden, 1, 1), (hidden, intermediate, 1, 1)),
        ((hidden, 1, 1), (q, 1, 1), (hidden, 1, 1), (intermediate, 1, 1)),
    )


def deepseek() -> Model:
    """DeepSeek-V3's blocks with experts (its config.json): 256 of them and a shared one, a token reaches 8 and the shared one."""
    hidden, inner, heads, q_rank, kv_rank, rope, nope, value = 7168, 2048, 128, 1536, 512, 64, 128, 128
    linears = (
        (q_rank + kv_rank + rope, hidden, 1, 1),
        (heads * (nope + rope), q_rank, 1, 1),
        (heads * (nope + value), kv_rank, 1, 1),
        (hidden, heads * value, 1, 1),
        (2 * inner, hidden, 257, 9),
        (hidden, inner, 257, 9),
    )
    inputs = (
        (hidden, 1, 1),
        (q_rank, 1, 1),
        (kv_rank, 1, 1),
        (heads * value, 1, 1),
        (hidden, 257, 9),
        (inner, 257, 9),
    )
    return Model("671B mixture", 58, hidden, linears, inputs)


MODELS = (
    llama("8B", 32, 4096, 14336, 32, 8, 128),
    llama("70B", 80, 8192, 28672, 64, 8, 128),
    deepseek(),
)


@dataclass(frozen=True)
class Rates:
    """calibration: seconds of a multiply-add. search: seconds of a weight, and of a product. network, disk: bytes a second."""

    calibration: float
    search: tuple[float, float]
    network: float
    disk: float

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Take them from a file like docs/bench_scale.json."""
        told = json.loads(path.read_text("utf-8"))
        small, wide = told["measured"]["blocks"]
        models = [llama("", 1, **one["block"]) for one in (small, wide)]
        work = sum(
            row["tokens"] * (model.forward + model.statistics)
            for one, model in zip((small, wide), models, strict=True)
            for row in one["rows"]
        )
        calibration = sum(row["calibration"] for one in (small, wide) for row in one["rows"])
        searches = [sum(row["search"] for row in one["rows"]) / len(one["rows"]) for one in (small, wide)]
        assumed = told["assumed"]
        return cls(
            calibration / work,
            _two_rates(models, searches),
            assumed["network_bytes_per_second"],
            assumed["disk_bytes_per_second"],
        )

    def seconds_of_search(self, model: Model) -> float:
        """Of one block."""
        weight, product = self.search
        return model.weights * weight + model.products * product


def _two_rates(models: list[Model], seconds: list[float]) -> tuple[float, float]:
    """Solve seconds = a weights + b products for two blocks. ValueError where a rate would be negative."""
    (w0, w1), (p0, p1) = ([getattr(one, name) for one in models] for name in ("weights", "products"))
    product = (seconds[1] * w0 - seconds[0] * w1) / (p1 * w0 - p0 * w1)
    weight = (seconds[0] - product * p0) / w0
    if weight < 0 or product < 0:
        raise ValueError(f"searches of {seconds} s do not grow like weights and products: measure both blocks alone")
    return weight, product


@dataclass(frozen=True)
class Cost:
    """Of one machine of several. Bytes: read from its disk; sent (inputs, by each) and received (layers, by the first one); held
    (statistics, the inputs of one batch, hidden states), and as page cache (the blocks of a window). Seconds by part.
    """

    read: float
    sent: float
    layers: float
    statistics: float
    batch: float
    hidden: float
    cache: float
    seconds: dict[str, float]


def cost(model: Model, rates: Rates, machines: int, tokens: int, batch: int) -> Cost:
    """Work out what ``quantize_checkpoint`` costs on so many machines, with propagate="float"."""
    window = min(machines, model.blocks)
    windows = -(-model.blocks // machines)
    read = model.blocks * model.weights * _FLOAT
    sent = model.blocks * tokens * model.input_bytes * (machines - 1) / machines**2
    layers = model.blocks * model.weights * _INT4 * (machines - 1) / machines
    work = tokens / machines * (model.forward + model.statistics)
    if machines > 1:  # the first batch runs once more everywhere
        work += batch * model.forward
    mine = tokens / machines + (batch if machines > 1 else 0)
    # what was recorded of a batch and its parcels, and those of all machines for the own block
    passing = 3 * batch * model.input_bytes * window if machines > 1 else 0
    seconds = {
        "read": read / rates.disk,
        "calibrate": model.blocks * work * rates.calibration,
        "send": (sent + layers) / rates.network,
        "search": windows * rates.seconds_of_search(model),
    }
    cache = window * model.weights * _FLOAT
    return Cost(read, sent, layers, model.statistics_bytes, passing, mine * model.hidden * _FLOAT, cache, seconds)


def tables(rates: Rates, machines: list[int], tokens: int, batch: int) -> str:
    """Both tables in Markdown."""
    columns = (
        "read",
        "inputs sent",
        "layers received",
        "statistics",
        "inputs of a batch",
        "hidden states",
        "page cache",
    )
    sizes = [f"| model | machines | {' | '.join(columns)} |", "|---|---" + "|---:" * len(columns) + "|"]
    times = ["| model | machines | read | calibrate | send | search | sum |", "|---|---" + "|---:" * 5 + "|"]
    for model in MODELS:
        for count in machines:
            one = cost(model, rates, count, tokens, batch)
            told = (one.read, one.sent, one.layers, one.statistics, one.batch, one.hidden, one.cache)
            sizes.append(f"| {model.name} | {count} | {' | '.join(map(_bytes, told))} |")
            parts = [*one.seconds.values(), sum(one.seconds.values())]
            times.append(f"| {model.name} | {count} | {' | '.join(map(_hours, parts))} |")
    return "\n".join([*sizes, "", *times])


def _bytes(value: float) -> str:
    if value < 1e8:
        return f"{value / 1e6:.0f} MB" if value else "0"
    return f"{value / 1e9:.1f} GB" if value < 1e11 else f"{value / 1e9:,.0f} GB"


def _hours(seconds: float) -> str:
    return "0" if not seconds else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=RATES)
    parser.add_argument("--tokens", type=int, default=128 * 512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--machines", default="1,4,16")
    args = parser.parse_args()
    machines = [int(count) for count in args.machines.split(",")]
    print(tables(Rates.read(args.rates), machines, args.tokens, args.batch))


if __name__ == "__main__":
    main()
