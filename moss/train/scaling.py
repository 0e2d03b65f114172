"""Memory, communication and time of one GPU of many, on paper: the paper's layout beside FSDP, at the size of MOSS.

What    `fsdp` is what `moss/dist.py` does (ZeRO-3: weights, gradients and optimizer cut over all GPUs); `zero1` is what
        the paper trained with (section 3.3): two pipeline stages, and only the optimizer cut, over the GPUs of a stage.
Why     Nobody should rent 128 GPUs to learn that a layout does not fit or waits for its network.
How     needs = fsdp(MOSS, Cluster(128), rows=1280); needs.total, needs.moved, needs.seconds
        python -m moss.train.scaling                 # writes the tables of docs/scaling.md anew

Bytes of weights are counted on the meta device, those of activations are `plan`'s. What a GPU and a network can do
are the fields of `Cluster`: makers' figures and assumptions, not measurements. P = parameters, R = GPUs.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moss.files import replacing
from moss.lora import Spec
from moss.model import Decoder, ModelConfig, flops_per_token
from moss.train.memory import Bytes, Job, Net, head_needs, kept_by_block, sizes
from moss.train.plan import gigabytes, plan

MOSS = ModelConfig(107008, 34, 6144, 24, family="moss", head_dim=256, rotary_dim=64, ffn=24576, max_length=2048)
LENGTH = 2048  # tokens of a row, in the paper
CORPUS = 677e9  # tokens that it trained on
PAGE = Path(__file__).parent.parent.parent / "docs" / "scaling.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)


@dataclass(frozen=True)
class Cluster:
    """Machines of eight NVIDIA A100; all but the number is an assumption."""

    gpus: int
    per_node: int = 8
    memory: float = 80e9  # bytes
    flops: float = 312e12  # a second in bfloat16, as NVIDIA states them
    reached: float = 0.5  # share of these that training reaches
    nvlink: float = 300e9  # bytes a second that a GPU receives from its node: half of the 600 GB/s of both directions
    network: float = 25e9  # bytes a second that a GPU receives from other nodes: 200 Gb/s

    @property
    def nodes(self) -> int:
        """Machines."""
        return math.ceil(self.gpus / self.per_node)

    def collective(self, size: float, groups: int = 1) -> float:
        """Seconds of an all-gather or reduce-scatter of tensors of `size` bytes in all, in each of `groups` that share
        the nodes evenly: bound by what a GPU gets from its node, or what a node gets from others over its GPUs' ports.
        """
        members = min(self.gpus, self.per_node) // groups
        inside = size * (members - 1) / members / self.nvlink
        across = size * (self.nodes - 1) / self.nodes / (members * self.network)
        return max(inside, across)


@dataclass(frozen=True)
class Needs:
    """What one GPU, the fullest, needs for a step."""

    memory: Bytes  # by part
    moved: Bytes  # that it receives in a step, by kind
    compute: float  # seconds, the pipeline's idle time included
    waiting: float  # seconds of communication, were nothing computed meanwhile
    tokens: int  # of a step, over all GPUs
    micro: str  # how a step is divided
    moment: str = ""  # when memory is fullest, where that is known

    @property
    def total(self) -> float:
        """Bytes of memory."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: with communication wholly hidden behind computing, and not at all."""
        return max(self.compute, self.waiting), self.compute + self.waiting


def stages_of(config: ModelConfig, stages: int) -> list[int]:
    """Parameters of each pipeline stage: equal shares of the blocks, the embedding first, the head last."""
    with torch.device("meta"):
        model = Decoder(config)
    counts = [0] * stages
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            counts[int(name.split(".")[1]) * stages // config.num_layers] += parameter.numel()
        else:
            counts[0 if name.startswith("embed.") else -1] += parameter.numel()
    return counts


def computing(config: ModelConfig, cluster: Cluster, tokens: int, recomputed: bool) -> float:
    """Seconds in which every GPU computes its share of a step's tokens; recomputing is one forward more."""
    flops = flops_per_token(config, LENGTH) * (4 / 3 if recomputed else 1)
    return tokens * flops / (cluster.gpus * cluster.flops * cluster.reached)


def fsdp(config: ModelConfig, cluster: Cluster, *, rows: int, recomputed: bool = True) -> Needs:
    """ZeRO-3 as `dist.shard` does it, AdamW, in the largest micro-batches that fit.

    Cut over all GPUs, in float32: 4P/R weights, 4P/R gradients, 8P/R AdamW. Gathered in bfloat16: embedding and head
    from forward to backward, and two blocks. A micro-batch gathers 2P forward, 2P less embedding and head backward, and
    scatters gradients of 4P, for they are added up in float32; a GPU receives (R - 1)/R of each.
    """
    job = Job(
        (Net(config),),
        length=LENGTH,
        batch_tokens=rows * LENGTH,
        dtype=torch.bfloat16,
        muon=False,
        checkpointing=recomputed,
        device="cuda",
        ranks=cluster.gpus,
    )
    found, size = plan(job, cluster.memory), sizes(job.nets[0], torch.bfloat16)
    share, turns = (cluster.gpus - 1) / cluster.gpus, found.accumulate
    gather, scatter = 2 * size.trained + 2 * (size.trained - size.tables), 4 * size.trained
    return Needs(
        memory=found.bytes,
        moved={"weights": turns * gather * share, "gradients": turns * scatter * share},
        compute=computing(config, cluster, rows * LENGTH, recomputed),
        waiting=turns * (cluster.collective(gather) + cluster.collective(scatter)),
        tokens=rows * LENGTH,
        micro=f"{turns} x {found.micro_tokens // LENGTH}",
        moment=found.moment,
    )


def zero1(config: ModelConfig, cluster: Cluster, *, rows: int, stages: int = 2, recomputed: bool = True) -> Needs:
    """ZeRO-1 with a pipeline, as the paper had it: a row a micro-batch, one forward and one backward in turns (1F1B).

    A stage of S parameters on D = R / stages GPUs: 2S weights and 2S gradients in bfloat16 on each, and 12S/D for
    AdamW's two numbers and the float32 weights. Stage i keeps the activations of `stages` - i micro-batches. A step
    scatters gradients of 2S and gathers weights of 2S; between stages go hidden states and their gradients. The
    pipeline fills and drains: m micro-batches take the time of m + `stages` - 1.
    """
    copies, net = cluster.gpus // stages, Net(config)
    job = Job((net,), length=LENGTH, batch_tokens=LENGTH, dtype=torch.bfloat16, device="cuda", checkpointing=recomputed)
    by_block, layers = kept_by_block(net, job, 1), config.num_layers // stages
    turns, hidden = rows // copies, 2 * config.hidden * LENGTH  # hidden states of a row, bytes
    each: list[Bytes] = []
    for stage, count in enumerate(stages_of(config, stages)):
        flying = stages - stage
        inputs = flying * layers * hidden if recomputed else 0
        kept = sum(by_block.values()) * LENGTH * (1 if recomputed else flying * layers)
        kept_by_loss, forward, backward = head_needs(net, job, LENGTH)
        logits = kept_by_loss + max(forward, backward) if stage == stages - 1 else 0
        each.append(
            {
                "weights": 2 * count,
                "gradients": 2 * count,
                "optimizer": 12 * count / copies,
                "activations": inputs + kept,
                "logits": logits,
            }
        )
    fullest = max(each, key=lambda parts: sum(parts.values()))
    largest, share = max(stages_of(config, stages)), (copies - 1) / copies
    between = turns * hidden
    return Needs(
        memory={part: value for part, value in fullest.items() if value},
        moved={"weights": 2 * largest * share, "gradients": 2 * largest * share, "hidden states": between},
        compute=computing(config, cluster, rows * LENGTH, recomputed) * (turns + stages - 1) / turns,
        waiting=2 * cluster.collective(2 * largest, stages) + 2 * between / cluster.nvlink,
        tokens=rows * LENGTH,
        micro=f"{turns} x 1",
        moment="the last micro-batch",
    )


# ---------------------------------------------------------------- tables

# GPUs and rows of a step: the paper's fine-tuning, and its pre-training (2.6 million tokens).
STEPS = ((8, 32), (128, 1280))
GROUPS = {  # of `plan`'s parts, as the table shows them
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "gathered weights": ("gathered weights",),
    "activations": ("activations", "block inputs", "norms", "projections", "mlp", "attention", "scores", "adapters"),
    "logits, backward, batch": ("logits", "backward", "data", "outside blocks", "update"),
}


def layouts() -> dict[str, tuple[Cluster, Needs]]:
    """What docs/scaling.md compares."""
    found: dict[str, tuple[Cluster, Needs]] = {}
    for gpus, rows in STEPS:
        cluster = Cluster(gpus)
        found[f"{gpus}, ZeRO-1, 2 stages"] = cluster, zero1(MOSS, cluster, rows=rows)
        found[f"{gpus}, FSDP"] = cluster, fsdp(MOSS, cluster, rows=rows)
        found[f"{gpus}, FSDP, nothing recomputed"] = cluster, fsdp(MOSS, cluster, rows=rows, recomputed=False)
    return found


def scaling_table() -> str:
    """Memory, communication and time of a GPU, a layout a column."""
    found = layouts()
    every = [needs for _, needs in found.values()]

    def sizes_of(values: list[float]) -> list[str]:
        return [gigabytes(value) if value else "" for value in values]

    rows = {
        name: sizes_of([sum(needs.memory.get(part, 0.0) for part in parts) for needs in every])
        for name, parts in GROUPS.items()
    }
    rows["**memory**"] = [f"**{gigabytes(needs.total)}**" for needs in every]
    rows["at its fullest"] = [needs.moment for needs in every]
    rows["micro-batches x rows"] = [needs.micro for needs in every]
    for kind in ("weights", "gradients", "hidden states"):
        rows[f"received: {kind}"] = sizes_of([needs.moved.get(kind, 0.0) for needs in every])
    rows["computing"] = [f"{needs.compute:.1f} s" for needs in every]
    rows["communication"] = [f"{needs.waiting:.1f} s" for needs in every]
    rows["tokens a second, at best and at worst"] = [
        " and ".join(f"{needs.tokens / each:,.0f}" for each in needs.seconds) for needs in every
    ]
    rows[f"days for {CORPUS / 1e9:.0f} billion tokens"] = [
        " and ".join(f"{CORPUS / needs.tokens * each / 86400:.0f}" for each in needs.seconds) for needs in every
    ]
    lines = [f"| GPUs, layout | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()])


def card_table(memory: float = 24e9, rank: int = 16) -> str:
    """LoRA at this size on one card of 24 GB: what each kind of base needs, in rows of LENGTH, one at a time."""
    head = "| blocks of the base | base | adapters with gradients, AdamW | activations | logits, backward | in all |"
    lines = [head, "|---|---|---|---|---|---|"]
    for width, again in (("", True), ("int8", True), ("int4", True), ("int4", False)):
        spec = Spec(rank, 2.0 * rank, base=width)  # type: ignore[arg-type]
        job = Job((Net(MOSS, lora=spec),), length=LENGTH, batch_tokens=LENGTH, dtype=torch.bfloat16, muon=False)
        found = plan(Job(**{**vars(job), "device": "cuda", "checkpointing": again}), memory)
        part = found.bytes.get
        small = sum(part(name, 0.0) for name in ("weights", "computing copy", "gradients", "optimizer"))
        kept = sum(part(name, 0.0) for name in GROUPS["activations"])
        rest = sum(part(name, 0.0) for name in GROUPS["logits, backward, batch"])
        cells = [gigabytes(value) for value in (found.bytes["frozen base"], small, kept, rest)]
        whole = gigabytes(found.total) + ("" if found.fits else ": no")
        lines.append(f"| {width or 'bfloat16'}{', recomputed' if again else ''} | {' | '.join(cells)} | {whole} |")
    return "\n".join(lines)


TABLES = {"scaling": scaling_table, "card": card_table}


def with_tables(page: str) -> str:
    """The page with its tables as the code has them."""
    return TABLE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", page)


def main() -> int:
    text = with_tables(PAGE.read_text(encoding="utf-8"))
    with replacing(PAGE) as beside:
        beside.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
