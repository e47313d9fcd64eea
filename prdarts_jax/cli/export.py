"""`prdarts export` and `prdarts import-torch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prdarts_jax.cli.flags import Argument, command
from prdarts_jax.config.places import expanded
from prdarts_jax.errors import UserError, unknown

if TYPE_CHECKING:
    from prdarts_jax.interop.export import Network

FORMATS = ("stablehlo", "safetensors")
_PIXELS = {"cifar": 32, "imagenet": 224}


@command(
    "export",
    "A trained network as a program without this library, or as a flat file.",
    Argument("workdir", metavar="WORKDIR", help="of prdarts train or import-torch, or a safetensors file"),
    Argument("--format", metavar="FORMAT", required=True, help=" | ".join(FORMATS)),
    Argument("--out", metavar="FILE", required=True),
    Argument("--platforms", default="cpu,cuda,tpu", help="of a program: of cpu, cuda, rocm, tpu"),
    Argument("--ema", action="store_true", help="the averaged weights, of a training that kept them"),
)
def export_command(args: argparse.Namespace) -> int:
    """`prdarts export WORKDIR --format stablehlo|safetensors --out FILE [--platforms cpu,cuda,tpu] [--ema]`.

    Raises:
      UserError: bad usage, or a workdir without a trained network.
      RunError: a file cannot be written.
    """
    if args.format not in FORMATS:
        raise unknown("--format", args.format, FORMATS)
    source, out = expanded(args.workdir, "WORKDIR"), expanded(args.out, "--out")
    if not source.exists():
        raise UserError(f"WORKDIR: no directory or file {str(source)!r}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out: {str(out)!r} is a folder, or in none that exists; allowed: a file in a folder")
    from prdarts_jax.interop import export

    net, variables, description = _network(source, ema=args.ema)
    if args.format == "safetensors":
        export.safetensors(variables, out, description)
        print(f"written: {out}")
        return 0
    platforms = [name for name in args.platforms.split(",") if name]
    beside = export.write_stablehlo(out, variables, net, description, platforms=platforms)
    print(f"written: {out}\nwritten: {beside}")
    return 0


def _network(source: Path, *, ema: bool) -> Network:
    """The network of a file, of an import, or of a training, finished or not."""
    from prdarts_jax.devices import sharding
    from prdarts_jax.interop import export
    from prdarts_jax.training import evaluation

    sharding.visible()
    flat, is_training = source / export.NETWORK_FILE, (source / "config.json").is_file()
    if ema and not is_training:
        raise UserError("--ema: a file or an import holds one set of weights; allowed: the workdir of a training")
    if source.is_dir() and not is_training and not flat.is_file():
        seeds = sorted(path.parent.name for path in source.glob("seed*/config.json"))
        allowed = f"one of its seeds, {', '.join(seeds)}" if seeds else "that of train or import-torch, or a file"
        raise UserError(f"WORKDIR: {str(source)!r} holds no {export.NETWORK_FILE}; allowed: {allowed}")
    if not is_training or (flat.is_file() and not ema):
        needs_user = is_training and export.load_safetensors(flat)[1].get("own_operations")
        return export.load_network(source, evaluation.own_primitives(source) if needs_user else None)
    trained = evaluation.restore(source)
    net, variables = trained.problem.network, trained.ema if ema else trained.variables
    if variables is None:
        raise UserError("--ema: the training kept no averaged weights; allowed: a training with --ema DECAY")
    if not flat.is_file():
        print(f"prdarts: note: the training is not finished: weights after epoch {trained.epoch}", file=sys.stderr)
    mean, std = trained.problem.mean, trained.problem.std
    description = export.describe(net, trained.image, mean=mean, std=std, class_names=trained.class_names)
    return export.Network(net.clone(dtype="float32"), variables._asdict(), description)


@command(
    "import-torch",
    "A PyTorch checkpoint of the DARTS family's evaluation networks.",
    Argument("file", metavar="FILE", help="a state_dict of NetworkCIFAR or NetworkImageNet"),
    Argument(
        "--genotype",
        metavar="NAME",
        required=True,
        help="of the zoo | FILE | FILE:NAME of several | WORKDIR | the text",
    ),
    Argument("--workdir", metavar="DIR", required=True),
    Argument("--stem", metavar="STEM", help="cifar | imagenet (default: as the names say)"),
    Argument("--mean", metavar="M,M,M", help="of the images (default: of CIFAR-10, CIFAR-100 or ImageNet)"),
    Argument("--std", metavar="S,S,S", help="of the images (default: likewise)"),
    Argument("--image-size", metavar="PIXELS", help="default: 32, or 224 for ImageNet"),
    Argument("--overwrite", action="store_true", help="replace the network that is in DIR"),
)
def import_command(args: argparse.Namespace) -> int:
    """`prdarts import-torch FILE --genotype NAME --workdir DIR`: a PyTorch state_dict as a workdir.

    Raises:
      UserError: bad usage, or a checkpoint that is not the genotype's network; nothing is created then.
      RunError: a file cannot be written.
    """
    from prdarts_jax.run.workdir import check_writable
    from prdarts_jax.space.genotype import Genotype

    mean, std = _numbers("--mean", args.mean), _numbers("--std", args.std)
    if any(value <= 0 for value in std):
        raise UserError(f"--std: {args.std}; allowed: numbers > 0")
    size = _numbers("--image-size", args.image_size)
    if size and (len(size) != 1 or size[0] < 1 or size[0] % 1):
        raise UserError(f"--image-size: {args.image_size}; allowed: one integer >= 1")
    genotype, workdir = Genotype.load(args.genotype), expanded(args.workdir, "--workdir")
    check_writable(workdir)
    from prdarts_jax.data.sources import NORMALIZATION
    from prdarts_jax.devices import sharding
    from prdarts_jax.interop import export, import_torch
    from prdarts_jax.network.module import DerivedNetwork
    from prdarts_jax.network.plan import check_auxiliary

    sharding.visible()
    runs = [*workdir.glob("config.json"), *sorted(workdir.glob("seed*/config.json"))]
    there = [path for path in (workdir / export.NETWORK_FILE, workdir / "genotype.json", *runs) if path.exists()]
    if there and (runs or there[0].name != export.NETWORK_FILE or not args.overwrite):
        allowed = "another folder" if runs else "another folder, or --overwrite"
        raise UserError(
            f"--workdir: {str(workdir)!r} holds {there[0].relative_to(workdir)} already; allowed: {allowed}"
        )
    state_dict = import_torch.load_state_dict(expanded(args.file, "FILE"))
    converted = import_torch.convert(state_dict, genotype, stem=args.stem)
    net = DerivedNetwork(genotype, **converted.network)
    pixels = int(size[0]) if size else _PIXELS[net.stem]
    if net.auxiliary:
        check_auxiliary(net.stem, pixels, pixels)
    cifar = "cifar100" if net.classes == 100 else "cifar10"
    usual_mean, usual_std = NORMALIZATION["imagenet2012" if net.stem == "imagenet" else cifar]
    image = (pixels, pixels, converted.channels)
    description = export.describe(net, image, mean=mean or usual_mean, std=std or usual_std)
    export.save_network(workdir, net, converted.variables, description)
    for note in converted.notes:
        print(f"prdarts: note: {note}", file=sys.stderr)
    heading = f"{net.cells} cells, {net.channels} channels, {net.classes} classes, stem {net.stem}"
    print(f"{heading}{', auxiliary head' if net.auxiliary else ''}\nwritten: {workdir / export.NETWORK_FILE}")
    return 0


def _numbers(flag: str, text: str | None) -> tuple[float, ...]:
    """Numbers with commas between; none for a flag that is not given."""
    try:
        return () if text is None else tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{flag}: {text!r}; allowed: numbers with commas between") from None
