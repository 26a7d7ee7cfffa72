"""Peak memory of one forward and backward pass over the number of tokens of one row, on the CPU, in float32.

    python tests/benchmark/memory_slope.py --json slope.json

Grows linearly where nothing of the size tokens x tokens is ever held. A second table has the same for freeze, where
layers below the lowest trained one keep nothing: more of them cost nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
HIDDEN, HEADS, VOCABULARY = 256, 4, 4096


def measure(mode: str, layers: int, tokens: int, trained: str) -> float:
    """MiB that one pass needs above the model, gradients included, as torch's own CPU allocator counts."""
    import torch
    from measured import peak_of

    from glm_models import MODE
    from tuning.samples.batches import MicroBatch, collate
    from tuning.samples.encoding import Sample

    torch.manual_seed(0)
    sizes = {"num_layers": layers, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    if mode == "glm":
        sizes |= {"vocab_size": VOCABULARY, "inner_hidden_size": 4 * HIDDEN, "max_sequence_length": 32768}
        sizes |= {"gmask_token_id": 1, "bos_token_id": 2, "mask_token_id": 4, "eos_token_id": 5}
    else:
        sizes |= {"padded_vocab_size": VOCABULARY, "ffn_hidden_size": 688, "kv_channels": HIDDEN // HEADS}
        sizes |= {"multi_query_group_num": 2, "seq_length": 32768}
    model = MODE[mode].model(MODE[mode].config(**sizes)).train()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((trained == "all layers" and "layers." in name) or f"layers.{layers - 1}." in name)
    prompt = tokens * 3 // 4
    ids = torch.randint(10, VOCABULARY, (tokens,)).tolist()
    context = 0
    if mode == "glm":
        ids[prompt - 2 : prompt], context = [1, 2], prompt - 1
    batch = collate([Sample(ids, ((prompt, len(ids)),), False, False)], lambda _: context, MicroBatch([0], 100.0))

    return peak_of(lambda: model(**batch).loss.backward()) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        mode, layers, tokens, trained = args.worker
        print("RESULT", measure(mode, int(layers), int(tokens), trained))
        return

    def ask(*worker) -> float:
        command = [sys.executable, __file__, "--worker", *map(str, worker)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return float(done.stdout.split("RESULT ")[1])

    figures = {}
    print(
        "| MiB above the model, 4 layers of width 256 train | "
        + " | ".join(f"{t:,}" for t in args.tokens)
        + " | last / first |"
    )
    print("|---|" + "---|" * (len(args.tokens) + 1))
    for mode in ("glm", "glm2", "glm3"):
        row = [ask(mode, 4, tokens, "all layers") for tokens in args.tokens]
        figures[mode] = dict(zip(args.tokens, row, strict=True))
        print(f"| {mode} | " + " | ".join(f"{x:.0f}" for x in row) + f" | {row[-1] / row[0]:.1f} |", flush=True)
    print("\n| MiB above the model, 4,096 tokens, the top layer trains | 1 layer | 4 layers | 16 layers |")
    print("|---|---|---|---|")
    for mode in ("glm", "glm2", "glm3"):
        row = [ask(mode, layers, 4096, "top") for layers in (1, 4, 16)]
        figures[f"{mode} freeze"] = row
        print(f"| {mode} | " + " | ".join(f"{x:.0f}" for x in row) + " |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
