"""How long a verification of T nodes takes beside one token of plain decoding, at a real model's shape.

    python benchmarks/round.py --out benchmarks/results/round.json

Random weights in the shape of Llama-2-7B, bfloat16, on one accelerator: layers unrolled and scanned, in turn.
The floor of a token is the time of reading parameters and live keys and values at the bandwidth of copies.
"""

import argparse
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
from _common import machine, spread, write_json
from kernels import copy_bandwidth, integers

import jax_specdec as sd
from jax_specdec.checkpoints.targets import Target
from jax_specdec.models import stack_layers
from jax_specdec.tuning.measure import verify_arm

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "mlp_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "mlp_size": 512,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=integers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--live", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the command")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    shape = TINY if args.tiny else LLAMA_2_7B
    dtype = jnp.bfloat16
    config = sd.ModelConfig(**shape, context=2 * args.live)
    bandwidth = copy_bandwidth(jax.default_backend())
    accelerator = jax.default_backend() != "cpu"
    ids = [[1 + i % 100 for i in range(args.live)] for _ in range(args.rows)]
    cache = 2 * args.rows * args.live * config.num_layers * config.num_kv_heads * config.head_dim
    # The embedding is not read but for one row of it.
    read = config.parameter_count() - config.vocab_size * config.hidden_size + cache
    floor = read * jnp.dtype(dtype).itemsize / bandwidth
    arms = {}
    for loop in ("unroll", "scan"):
        decoder = sd.Decoder(config, dtype, loop, stacked_cache=accelerator)
        flat = sd.Decoder(config, dtype)
        params = jax.jit(flat.init)(jax.random.key(0))
        if loop == "scan":
            params = jax.jit(stack_layers)(params)
        target = Target(decoder, params, None, Path())
        measured = {nodes: verify_arm(target, nodes, ids, args.rounds) for nodes in args.nodes}
        seconds = {nodes: [] for nodes in measured}
        for _ in range(args.repeats):
            for nodes, arm in measured.items():
                seconds[nodes].append(arm())
        token = statistics.median(seconds[args.nodes[0]])
        arms[loop] = {
            str(nodes): {
                "seconds": spread(taken),
                "over_one_token": statistics.median(taken) / token,
                "floor_over_time": floor / statistics.median(taken),
            }
            for nodes, taken in seconds.items()
        }
        for nodes, row in arms[loop].items():
            print(
                f"{loop}, T = {nodes}: {row['seconds']['median'] * 1e3:.3f} ms, "
                f"{row['over_one_token']:.2f} tokens, {row['floor_over_time']:.2f} of the floor"
            )
        del params, target, measured
    record = {"machine": machine(), "shape": shape, "rows": args.rows, "live": args.live}
    record |= {"copy_bytes_per_second": bandwidth, "floor_seconds": floor, "layer_loops": arms}
    write_json(args.out, record)


if __name__ == "__main__":
    main()
