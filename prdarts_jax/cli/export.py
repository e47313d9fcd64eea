"""`prdarts export` and `prdarts import-torch`: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prdarts_jax.cli.flags import Parser
from prdarts_jax.errors import UserError, unknown

FORMATS = ("stablehlo", "safetensors")
_PIXELS = {"cifar": 32, "imagenet": 224}


def export_command(words: list[str]) -> int:
    """`prdarts export WORKDIR --format stablehlo|safetensors --out FILE [--platforms cpu,cuda,tpu] [--ema]`.

    Args:
      words: the command line after the command.

    Raises:
      UserError: bad usage, or a workdir without a trained network.
      RunError: a file cannot be written.
    """
    parser = Parser(
        "prdarts export", description="A trained network as a program without this library, or as a flat file."
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="of prdarts train or import-torch, or a safetensors file")
    parser.add_argument("--format", metavar="FORMAT", required=True, help=" | ".join(FORMATS))
    parser.add_argument("--out", metavar="FILE", required=True)
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="of a program: of cpu, cuda, rocm, tpu")
    parser.add_argument("--ema", action="store_true", help="the averaged weights, of a training that kept them")
    args = parser.parse_args(words)
    if args.format not in FORMATS:
        raise unknown("--format", args.format, FORMATS)
    source, out = Path(args.workdir), Path(args.out)
    if not source.exists():
        raise UserError(f"WORKDIR: no directory or file {str(source)!r}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out: {str(out)!r} is a folder, or in none that exists; allowed: a file in a folder")
    from prdarts_jax.interop import export

    network = _network(source, ema=args.ema)
    if args.format == "safetensors":
        export.safetensors(network.variables, out, network.description)
        print(f"written: {out}")
        return 0
    platforms = [name for name in args.platforms.split(",") if name]
    beside = export.write_stablehlo(out, network.variables, network.net, network.description, platforms=platforms)
    print(f"written: {out}\nwritten: {beside}")
    return 0


def _network(source: Path, *, ema: bool) -> Any:
    """The network of a file, of an import, or of a training, finished or not."""
    from prdarts_jax.interop import export
    from prdarts_jax.training import evaluation

    there = source.is_dir() and (source / export.NETWORK_FILE).is_file()
    if source.is_dir() and (source / "config.json").is_file():
        if there and not ema:
            _, about = export.load_safetensors(source / export.NETWORK_FILE)
            own = evaluation.own_primitives(source) if about.get("own_operations") else None
            return export.load_network(source, own)
        trained = evaluation.restore(source)
        variables = trained.ema if ema else trained.variables
        if variables is None:
            raise UserError("--ema: the training kept no averaged weights; allowed: a training with --ema DECAY")
        if not there:
            print(f"prdarts: note: the training is not finished: weights after epoch {trained.epoch}", file=sys.stderr)
        mean, std = trained.problem.mean, trained.problem.std
        net = trained.problem.network
        about = export.describe(net, trained.image, mean=mean, std=std, class_names=trained.class_names)
        return export.Network(net.clone(dtype="float32"), variables._asdict(), about)
    if ema:
        raise UserError("--ema: a file or an import holds one set of weights; allowed: the workdir of a training")
    if source.is_dir() and not there:
        seeds = sorted(path.parent.name for path in source.glob("seed*/config.json"))
        allowed = f"one of its seeds, {', '.join(seeds)}" if seeds else "that of train or import-torch, or a file"
        raise UserError(f"WORKDIR: {str(source)!r} holds no {export.NETWORK_FILE}; allowed: {allowed}")
    return export.load_network(source)


def import_command(words: list[str]) -> int:
    """`prdarts import-torch FILE --genotype NAME --workdir DIR`: a PyTorch state_dict as a workdir of ours.

    Args:
      words: the command line after the command.

    Raises:
      UserError: bad usage, or a checkpoint that is not the genotype's network; nothing is created then.
      RunError: a file cannot be written.
    """
    parser = Parser(
        "prdarts import-torch", description="A PyTorch checkpoint of the DARTS family's evaluation networks."
    )
    parser.add_argument("file", metavar="FILE", help="a state_dict of NetworkCIFAR or NetworkImageNet")
    parser.add_argument("--genotype", metavar="NAME", required=True, help="a name, a file or a workdir")
    parser.add_argument("--workdir", metavar="DIR", required=True)
    parser.add_argument("--stem", metavar="STEM", help="cifar | imagenet (default: as the names say)")
    parser.add_argument("--mean", metavar="M,M,M", help="of the images (default: of CIFAR-10, CIFAR-100 or ImageNet)")
    parser.add_argument("--std", metavar="S,S,S", help="of the images (default: likewise)")
    parser.add_argument("--image-size", metavar="PIXELS", help="default: 32, or 224 for ImageNet")
    parser.add_argument("--overwrite", action="store_true", help="replace the network that is in DIR")
    args = parser.parse_args(words)
    from prdarts_jax.run.workdir import check_writable
    from prdarts_jax.space.genotype import Genotype

    given = {name: _numbers(f"--{name}", getattr(args, name)) for name in ("mean", "std")}
    if any(value <= 0 for value in given["std"] or ()):
        raise UserError(f"--std: {args.std}; allowed: numbers > 0")
    size = _numbers("--image-size", args.image_size)
    if size is not None and (len(size) != 1 or size[0] < 1 or size[0] % 1):
        raise UserError(f"--image-size: {args.image_size}; allowed: one integer >= 1")
    genotype, workdir = Genotype.load(args.genotype), Path(args.workdir)
    check_writable(workdir)
    from prdarts_jax.data.sources import NORMALIZATION
    from prdarts_jax.interop import export, import_torch
    from prdarts_jax.network.module import DerivedNetwork
    from prdarts_jax.network.plan import check_auxiliary

    seeds = sorted(str(path.relative_to(workdir)) for path in workdir.glob("seed*/config.json"))
    there = [name for name in (export.NETWORK_FILE, "genotype.json", "config.json") if (workdir / name).exists()]
    there += seeds[:1]
    ours = export.NETWORK_FILE in there and "config.json" not in there and not seeds
    if there and not (args.overwrite and ours):
        allowed = "another folder" if "config.json" in there or seeds else "another folder, or --overwrite"
        raise UserError(f"--workdir: {str(workdir)!r} holds {there[0]} already; allowed: {allowed}")
    converted = import_torch.convert(import_torch.load_state_dict(Path(args.file)), genotype, stem=args.stem)
    net = DerivedNetwork(genotype, **converted.network)
    if net.stem == "imagenet":
        data = "imagenet2012"
    else:
        data = "cifar100" if net.classes == 100 else "cifar10"
    pixels = int(size[0]) if size else _PIXELS[net.stem]
    if net.auxiliary:
        check_auxiliary(net.stem, pixels, pixels)
    mean, std = (given[name] or usual for name, usual in zip(("mean", "std"), NORMALIZATION[data], strict=True))
    image = (pixels, pixels, converted.channels)
    export.save_network(workdir, net, converted.variables, export.describe(net, image, mean=mean, std=std))
    for note in converted.notes:
        print(f"prdarts: note: {note}", file=sys.stderr)
    heading = f"{net.cells} cells, {net.channels} channels, {net.classes} classes, stem {net.stem}"
    print(f"{heading}{', auxiliary head' if net.auxiliary else ''}\nwritten: {workdir / export.NETWORK_FILE}")
    return 0


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{flag}: {text!r}; allowed: numbers with commas between") from None
