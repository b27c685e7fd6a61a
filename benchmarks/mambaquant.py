"""MambaQuant on the trained Mamba of benchmarks/weights: what W8A8 loses in perplexity, by where the outliers are.

    python benchmarks/mambaquant.py [--json] [--scan] [--site TEXT]

Rows are the plain weights, and the same function with outliers of 20 to 60 at the norms' gains, in front of the convolutions, in the
steps' low-rank form, in B against C, and at all of them (benchmarks/outliers.py, mamba_outliers.py). `nearest` rounds only;
`hadamard` turns by Hadamard matrices, as QuaRot does; `smooth` only scales; `klt` turns by K H without scaling; `mambaquant` does
all. Every method quantizes the same tensors, scan operands included, with the same calibration windows; --scan adds the
form with float scan operands. One thread.
"""

import argparse
import functools
import json
import sys

import low_bit
import mamba_outliers
import outliers
import torch
from planish.compress import evaluation
from planish.compress.data import Data, check

SITES = {
    "plain": ((), False),
    "norms": ((), True),
    "convolution": (("convolution",), False),
    "step": (("step",), False),
    "state": (("state",), False),
    "all": (mamba_outliers.SITES, True),
}
"""outliers inside the blocks, and whether at the norms too"""
METHODS = {
    "nearest": {"smooth": False, "rotate": False},
    "hadamard": {"smooth": False, "klt": False},
    "smooth": {"rotate": False},
    "klt": {"smooth": False},
    "mambaquant": {},
}


def perplexity(model, held_out):
    return evaluation.perplexity(evaluation.language(model), held_out).value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scan", action="store_true", help="also with float scan operands")
    parser.add_argument("--site", help="only the rows of this site")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain, calibration, held_out = low_bit.trained("mamba")
    data = check(Data({"input_ids": calibration}, None, "calibration"), plain.inputs)
    exact = perplexity(plain, held_out)
    say = functools.partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    say(f"float perplexity {exact:.3f} on {held_out.size} tokens; what follows is the loss against it")
    say(f"{'outliers':14}{'float':>9}" + "".join(f"{m:>12}" for m in METHODS))
    rows = []
    for site, (inside, norms) in SITES.items():
        if arguments.site not in (None, site):
            continue
        model = outliers.inject(plain)[0] if norms else plain
        model = mamba_outliers.inject(model, inside) if inside else model
        for scan in (True, False) if arguments.scan else (True,):
            row = {"outliers": site, "scan": scan, "float": perplexity(model, held_out) / exact - 1}
            say(f"{site if scan else '  float scan':14}{row['float']:9.2%}", end="")
            for method, fields in METHODS.items():
                step = f"quantize.mambaquant: {json.dumps(fields | {'scan': scan})}"  # JSON is YAML
                quantized, _ = low_bit.quantize(model, [step], data)
                row[method] = perplexity(quantized, held_out) / exact - 1
                say(f"{row[method]:12.2%}", end="")
            say()
            rows.append(row)
    last = rows[-1]
    if arguments.json:
        print(json.dumps({"perplexity": exact, "rows": rows}))
    elif last["outliers"] == "all":
        reached = last["mambaquant"] <= 0.01 < last["hadamard"]
        print(f"MambaQuant within 1 % where Hadamard is not: {'REACHED' if reached else 'NOT REACHED'}")


if __name__ == "__main__":
    main()
