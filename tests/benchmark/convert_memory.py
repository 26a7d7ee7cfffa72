"""Main memory that glm_models.convert takes at the most, verification included, in both directions.

    python tests/benchmark/convert_memory.py [--mode glm2]

Makes a random float16 checkpoint of more than 2 GB in several shards, converts it to a GlmForCausalLM and back in
processes of their own, and compares the files with the first. Prints JSON, bytes: `rss` is all that is resident
(VmHWM), pages of mapped files too; `private` the most of it that is not (RssAnon, sampled every 5 ms); `bound` is the
largest shard + 0.5 GB. Linux only.
"""

import argparse
import filecmp
import json
import sys
import tempfile
from pathlib import Path

import merge_memory

from glm_models.checkpoint import weight_layout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("glm2", "glm3"), default="glm3")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--shard", type=float, default=0.6, help="most GB of a shard")
    parser.add_argument("--folder", help="where the checkpoint is made (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        base = work / "base"
        merge_memory.make(args.mode, work, args.layers, args.hidden_size, int(args.shard * 1e9), False)
        shards = [path.stat().st_size for path in map(Path, weight_layout(str(base)))]
        result = {"checkpoint": sum(shards), "shards": len(shards), "largest_shard": max(shards)}
        result["bound"] = int(max(shards) + 0.5e9)
        result["imports"] = merge_memory.measure(["-c", "import glm_models.convert.__main__"])
        for source, made in (("base", "native"), ("native", "back")):
            command = ["-m", "glm_models.convert", "--mode", args.mode, "--model_path", str(work / source)]
            result[f"to_{made}"] = merge_memory.measure([*command, "--output_dir", str(work / made)])
        names = [path.name for path in base.iterdir()]
        _, different, missing = filecmp.cmpfiles(base, work / "back", names, shallow=False)
        result["other_files_than_before"] = sorted(different + missing)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if max(result["to_native"]["rss"], result["to_back"]["rss"]) > result["bound"]:
        sys.exit("a conversion took more than the bound")
    if result["other_files_than_before"]:
        sys.exit("the way back did not give the same files")


if __name__ == "__main__":
    main()
