"""`plan`: whether a model fits hardware that is not here, and how fast it would be."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_specdec import display
from jax_specdec.cli import common
from jax_specdec.cli import mesh as meshes
from jax_specdec.errors import UserError

if TYPE_CHECKING:
    from jax_specdec.models.config import ModelConfig
    from jax_specdec.models.decoder import Decoder
    from jax_specdec.specs.language import Spec
    from jax_specdec.tuning.plan import Question

TAUS = (1.0, 2.0, 3.0, 4.0)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="does it fit devices that are not here, and how fast would it be",
        description="Compiles prefill and one decoding round for described devices, and says what they take. "
        "Needs the model's config.json alone.",
        examples=(
            "--model DIR --topology v5e:2x4",
            "--model DIR --topology h100:8 --mesh data=2,tensor=4 --batch-size 16",
            "--model DIR --topology cpu:8 --arithmetic --json",
        ),
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        required=True,
        help="a folder or file with config.json, or a model id of the Hugging Face hub",
    )
    parser.add_argument(
        "--drafter",
        metavar="SPEC",
        default="glide:7+cape:16",
        help="none, max-gram, prompt-lookup, glide, medusa or lm, with an expansion (default: glide:7+cape:16); "
        "glide and medusa have their default shape unless --draft names a checkpoint",
    )
    parser.add_argument(
        "--draft",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="where a drafter's checkpoint is",
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        required=True,
        help="such as v5e:2x4, v6e:4x4, tpu7x:2x2x1, cpu:8; of GPUs, such as h100:8, by arithmetic only",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="rows over data and the model over tensor, as in data=2,tensor=4 (default: all devices along "
        "tensor, as far as they divide the model)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="rows at a time (default: 1)"
    )
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens of a row (default: 8192)"
    )
    parser.add_argument(
        "--dtype", choices=common.DTYPES, default="bfloat16", help="default: bfloat16"
    )
    common.add_int8(parser, draft=False)
    parser.add_argument(
        "--arithmetic", action="store_true", help="by formulas alone: no compiler, no seconds"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    common.at_least_one(args, "batch_size", "context")
    found = answer(args)
    if args.json:
        common.print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def answer(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as a JSON object."""
    from jax_specdec.specs.whole import parse_drafter
    from jax_specdec.tuning import hardware

    topology = hardware.parse_topology(args.topology)
    spec, folders = parse_drafter(args.drafter), common.draft_folders(args.draft)
    config, home = _config(args.model)
    if topology.hardware.platform == "cpu":
        _cpu_devices(topology.devices)

    from jax_specdec.tuning import plan

    sizes = _mesh(args, config, topology.devices)
    sized = (config, topology, sizes, args.batch_size, args.context, args.dtype)
    question = plan.Question(*sized, args.int8)
    builder = ShapedDrafter(spec, folders, home, config)
    own, nodes = builder.size(question)
    found: dict[str, Any] = {
        "topology": topology.name,
        "devices": topology.devices,
        "hardware": topology.hardware.name,
        "mesh": sizes,
        "drafter": args.drafter,
        "batch_size": args.batch_size,
        "context": args.context,
        "dtype": args.dtype,
        "int8": list(args.int8),
        **plan.by_arithmetic(question, own, nodes),
        "by": "arithmetic",
    }
    if not args.arithmetic and topology.hardware.platform != "gpu" and _may_fit(found):
        try:
            program = plan.compiled(question, builder.make)
        except plan.TooLarge as error:
            found |= {"fits": False, "by": "compiler", "reason": f"{error}"}
        else:
            total = max(program["prefill"]["total"], program["round"]["total"])
            capacity = found["memory"]["capacity"]
            found |= {"by": "compiler", "program": program, "fits": total <= capacity}
            if total > capacity:
                found["reason"] = f"{display.size(total)} of {display.size(capacity)}"
    if not found["fits"]:
        memory = found["memory"]
        found.setdefault(
            "reason",
            f"{display.size(memory['total'])} of {display.size(memory['capacity'])} of a device",
        )
        found["alternatives"] = plan.alternatives(question, own, nodes)
    drafting = builder.read / topology.hardware.bandwidth
    round_s = found["verification"]["seconds"]["total"] + drafting
    found["round_s"] = round_s
    plain = plan.seconds(question, plan.parts_by_arithmetic(question, 0, 1))["total"]
    found["plain_tokens_per_second"] = args.batch_size / plain
    found["tokens_per_second"] = {str(tau): args.batch_size * tau / round_s for tau in TAUS}
    return found


def _may_fit(found: dict[str, Any]) -> bool:
    """Whether compiling is worth the minutes: parameters and cache alone are certain."""
    memory = found["memory"]
    return memory["parameters"] + memory["cache"] <= memory["capacity"]


def _config(source: str) -> "tuple[ModelConfig, Path]":
    """The configuration in a file, a folder or a model of the hub, and where it lies."""
    from jax_specdec.checkpoints.hub import fetch_config
    from jax_specdec.checkpoints.target_tensors import read_hf_config
    from jax_specdec.models.hf import config_from_hf

    path = fetch_config(source)
    return config_from_hf(read_hf_config(path)), path.parent


def _mesh(args: argparse.Namespace, config: "ModelConfig", devices: int) -> dict[str, int]:
    """What was asked for, or as much of `tensor` as the model divides over."""
    if args.mesh:
        return meshes.parse_mesh(args.mesh)
    sizes = (config.num_heads, config.vocab_size, *config.mlp_sizes)
    tensor = max(
        n for n in range(1, devices + 1) if devices % n == 0 and not any(s % n for s in sizes)
    )
    data = devices // tensor
    if args.batch_size % data:
        raise UserError(
            f"This model divides over {tensor} of {devices} devices ({config.num_heads} heads), and a batch of "
            f"{args.batch_size} not over the {data} groups that are left: choose a --batch-size that is a multiple of "
            f"{data}, or fewer devices."
        )
    return {"data": data, "tensor": tensor}


def _cpu_devices(count: int) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", count)


class ShapedDrafter:
    """The drafter of a specification as shapes, beside any decoder."""

    def __init__(self, spec: "Spec", folders: dict[str, str], home: Path, config: "ModelConfig"):
        known = ("none", "max-gram", "prompt-lookup", "glide", "medusa", "lm")
        if any(name not in known for name in spec.names):
            raise UserError(f"plan knows the drafters {', '.join(known)}.")
        for name in spec.names:
            if name == "lm" and name not in folders:
                raise UserError("The drafter lm needs its checkpoint: --draft lm=DIR.")
        self.spec, self.folders, self.home, self.config = spec, folders, home, config
        self.read = 0

    def size(self, question: "Question") -> tuple[int, int]:
        """Bytes of its own parameters, and nodes of a verification; `read` has the bytes that the dearest draft reads."""
        import jax

        from jax_specdec.core.drafter import ways_of
        from jax_specdec.models.decoder import Decoder
        from jax_specdec.tuning.plan import bytes_per_draft_token

        drafter, own, _ = self._build(Decoder(question.config, question.dtype))
        size = {
            name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
            for name, tree in own.items()
        }
        self.read = max(
            way.info.depth * bytes_per_draft_token(way, size) for way in ways_of(drafter)
        )
        return sum(size.values()), drafter.info.nodes + 1

    def make(self, decoder: "Decoder") -> tuple[Any, Any, Any]:
        """See `plan.compiled`."""
        import jax

        drafter, own, models = self._build(decoder)
        sharding = decoder.sharding
        assert sharding is not None
        target = jax.eval_shape(decoder.init, jax.random.key(0))
        target_places = sharding.tree(decoder.axes()[0])
        shapes, places = {}, {}
        for name, tree in own.items():
            model = models[name]
            if hasattr(model, "places"):
                here = model.places()
            elif hasattr(model, "axes"):
                here = sharding.replicated.tree(model.axes()[0])
            else:
                here = sharding.whole(tree)
            joined = hasattr(model, "join")
            shapes[name] = model.join(tree, target) if joined else tree
            places[name] = model.join(here, target_places) if joined else here
        return drafter, shapes, places

    def _build(self, decoder: "Decoder") -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The drafter, shapes of its own parameters and its models, by name."""
        import functools

        import jax

        from jax_specdec.checkpoints.glide import read_glide_config
        from jax_specdec.checkpoints.targets import Target, load_config
        from jax_specdec.drafters.glide import GliDeDrafter
        from jax_specdec.drafters.lm import LmDrafter
        from jax_specdec.drafters.medusa import MedusaDrafter
        from jax_specdec.models.decoder import Decoder
        from jax_specdec.models.glide import GliDe
        from jax_specdec.models.glide_config import GliDeConfig
        from jax_specdec.models.medusa import Medusa, MedusaConfig
        from jax_specdec.specs.build import Drafters

        c, sharding = decoder.config, decoder.sharding
        own: dict[str, Any] = {}
        models: dict[str, Any] = {}
        makes: dict[str, Any] = {}
        for name in self.spec.names:
            if name == "glide":
                given = self.folders.get(name)
                # The checkpoint's geometry: on a mesh KV heads may be repeated.
                shape = (
                    GliDeConfig.like(self.config)
                    if given is None
                    else read_glide_config(Path(given))[0]
                )
                model = GliDe(shape, c, decoder.dtype, sharding)
                makes[name], own[name] = functools.partial(GliDeDrafter, model), model.shapes()
            elif name == "medusa":
                model = Medusa(MedusaConfig(), c, decoder.dtype)
                makes[name], own[name] = functools.partial(MedusaDrafter, model), model.shapes()
            elif name == "lm":
                small = load_config(self.folders[name])
                where = None if sharding is None else sharding.replicated
                model = Decoder(small, decoder.dtype, sharding=where)
                makes[name] = functools.partial(LmDrafter, model)
                own[name] = jax.eval_shape(model.init, jax.random.key(0))
            else:
                continue
            models[name] = model
        target = Target(decoder, {}, None, self.home)
        drafters = Drafters(target, drafts=self.folders, dtype=decoder.dtype)
        return drafters.assemble(self.spec, makes), own, models


def _lines(found: dict[str, Any]) -> list[str]:
    gib, memory = display.size, found["memory"]
    mesh = ",".join(f"{name}={size}" for name, size in found["mesh"].items())
    lines = [
        f"{found['topology']}: {found['devices']} devices ({found['hardware']}), mesh {mesh}, batch "
        f"{found['batch_size']}, context {found['context']}, {found['dtype']}{common.int8_note(found['int8'])}, drafter {found['drafter']}",
    ]
    if "program" in found:
        for name in ("prefill", "round"):
            part = found["program"][name]
            lines.append(
                f"{name}: {gib(part['total'])} of {gib(memory['capacity'])} a device (parameters "
                f"{gib(part['parameters'])}, caches and state {gib(part['state'])}, temporaries "
                f"{gib(part['temporaries'])}, code {gib(part['code'])})"
            )
        for kind, sums in found["program"]["collectives"].items():
            lines.append(f"{kind}: {sums['count']} a round, {gib(sums['bytes'])}")
        lines.append(f"compiled in {found['program']['compile_s']} s")
    else:
        lines.append(
            f"by arithmetic: {gib(memory['total'])} of {gib(memory['capacity'])} a device (parameters "
            f"{gib(memory['parameters'])}, cache {gib(memory['cache'])}, temporaries {gib(memory['temporaries'])})"
        )
    if found["fits"]:
        lines.append("It fits.")
    else:
        offers = found["alternatives"]
        fit = f"; what would fit: {', or '.join(offers)}" if offers else ""
        lines.append(f"It does not fit: {found['reason']}{fit}.")
    seconds = found["verification"]["seconds"]
    lines.append(
        f"roofline of a round: {found['round_s'] * 1e3:.2f} ms (verification {seconds['total'] * 1e3:.2f}: memory "
        f"{seconds['memory'] * 1e3:.2f}, arithmetic {seconds['arithmetic'] * 1e3:.2f}, links {seconds['links'] * 1e3:.2f})"
    )
    speeds = ", ".join(
        f"{speed:,.0f} at tau {tau}" for tau, speed in found["tokens_per_second"].items()
    )
    lines.append(f"tokens/s at most: {found['plain_tokens_per_second']:,.0f} plain; {speeds}")
    return lines
