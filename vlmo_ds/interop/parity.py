"""Compares a model with recorded numbers of a reference implementation.

    python -m vlmo_ds.interop.parity FILE [--dtype float64|float32] [--device cuda]

The file's format says which family's numbers it holds. Builds the model from the file's own configuration, prints one line
per quantity with its relative difference ||ours - recorded|| / ||recorded||, and exits 1 if one of them is past its bar.
"""

from __future__ import annotations

import argparse
import sys

import torch

from vlmo_ds.families import FAMILIES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a file of recorded numbers")
    parser.add_argument("--dtype", choices=["float64", "float32"], help="precision to run in (default: both)")
    parser.add_argument("--device", default="cpu", help="where to run, such as cuda (default: %(default)s)")
    args = parser.parse_args()
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    torch.set_default_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 would have 10 bits
    golden = torch.load(args.file, map_location=args.device, weights_only=True)
    formats = {name: check for family in FAMILIES.values() for name, check in family.parity().items()}
    check = formats.get(str(golden.get("format")))
    if check is None:
        print(f"{args.file} has format {golden.get('format')!r}; accepted: {', '.join(formats)}", file=sys.stderr)
        return 2
    failed = 0
    for name in [args.dtype] if args.dtype else ["float64", "float32"]:
        worst, count = 0.0, 0
        for quantity, difference, bar in check(golden, getattr(torch, name)):
            passed = difference <= bar
            failed, count, worst = failed + (not passed), count + 1, max(worst, difference / bar)
            print(f"{name} {'ok  ' if passed else 'FAIL'} {difference:9.2e} (bar {bar:.0e})  {quantity}")
        print(f"{name}: {count} quantities, the worst at {worst:.2g} of its bar")
    print("FAILED" if failed else "passed", f"{args.file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
