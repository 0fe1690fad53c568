"""Write the weights of an exported model as another library names and orders them.

python -m sparsevit.checkpoints outputs/coco/stages/report-…/export home.pth --format mmdet
"""

import argparse
import sys
from pathlib import Path

from sparsevit.checkpoints import CheckpointError, export_backbone_weights
from sparsevit.checkpoints.formats import FORMATS
from sparsevit.export import load_exported


def main(arguments: list[str] | None = None) -> int:
    """Write a whole Mask R-CNN for mmdet, the backbone for every other library."""
    parser = argparse.ArgumentParser(prog="python -m sparsevit.checkpoints", description=__doc__)
    parser.add_argument("export", type=Path, help="folder that a run exported")
    parser.add_argument("target", type=Path, help="file to write; a folder for huggingface")
    parser.add_argument("--format", required=True, choices=sorted({each.name for each in FORMATS}))
    parser.add_argument("--backbone", action="store_true", help="the backbone alone")
    parser.add_argument("--trusted", action="store_true", help="import the task that the folder names")
    options = parser.parse_args(arguments)
    try:
        print(f"{options.target}: {_write(options)}")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:  # torch wraps the operating system's
        print(f"error: {options.target} cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def _write(options: argparse.Namespace) -> str:
    """Write the file and say what is in it."""
    from sparsevit.tasks.mask_rcnn import SparseMaskRCNN
    from sparsevit.tasks.mask_rcnn.mmdet import export_mmdet

    exported = load_exported(options.export, trusted=options.trusted)
    model = exported.model
    if options.format == "mmdet" and isinstance(model, SparseMaskRCNN) and not options.backbone:
        export_mmdet(model, options.target, exported.config["classes"])
        return (
            f"the whole Mask R-CNN, {len(exported.config['classes'])} classes; meta.cfg in it says what "
            "mmdet has to be set to"
        )
    left_out = export_backbone_weights(exported.backbone, options.target, options.format)
    return "the backbone" + (f", without {', '.join(left_out)}" if left_out else "")


if __name__ == "__main__":
    sys.exit(main())
