"""Writes what is generated from the models, or checks that it is up to date.

`python -m tandem_operator.crds --output crds/ --chart charts/tandem/templates/crds
--docs docs/api.md [--check]`
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_operator.crds.kinds import KINDS
from tandem_operator.crds.reference import render_reference
from tandem_operator.crds.render import render_chart_template, render_crd


def generated_files(output: Path, chart: Path | None, docs: Path | None) -> dict[Path, str]:
    """Every generated file and what belongs into it."""
    files = {output / f"{kind.crd_name}.yaml": render_crd(kind) for kind in KINDS}
    if chart is not None:
        for kind in KINDS:
            files[chart / f"{kind.crd_name}.yaml"] = render_chart_template(kind)
    if docs is not None:
        files[docs] = render_reference(KINDS)
    return files


def stale_files(files: dict[Path, str]) -> list[Path]:
    """The files that are missing or differ, and generated files that no kind has any more."""
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    folders = {path.parent for path in files if path.suffix == ".yaml"}
    stale += [path for folder in folders for path in folder.glob("*.yaml") if path not in files]
    return sorted(stale)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check. Exit status 1: something is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tandem_operator.crds", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the CRDs")
    parser.add_argument("--chart", type=Path, help="folder of the chart's copies")
    parser.add_argument("--docs", type=Path, help="file of the API reference")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on differences")
    options = parser.parse_args(arguments)
    files = generated_files(options.output, options.chart, options.docs)
    if options.check:
        stale = stale_files(files)
        for path in stale:
            print(f"{path} is out of date: run `make gen`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
