#!/usr/bin/env bash
# From a folder of images to a tested network and its page: bash shell/own_images.sh FOLDER [--dry_run]
# FOLDER has train/ and test/ (or val/), in each a folder for every class. The sizes follow from the number of images and
# their pixels (docs/own-images.md). Every command is printed before it runs; --dry_run prints only. Started again, it
# goes on where it was stopped. ARCH=DDSAS_cifar10 trains that cell and searches for none; SEARCH="--epochs 5" and
# RETRAIN="--layers 8" change the two commands; OUT=logs/mine is another place for the run folders.
set -eu
explain() { sed -n '2,6s/^# //p' "$0"; }
case "$#:${2:-}:${1:-}" in *:--help) explain; exit 0 ;; 1::* | 2:--dry_run:*) ;; *) explain >&2; exit 2 ;; esac
[ -d "$1" ] || { echo "own_images.sh: no folder $1" >&2; exit 2; }
folder=$(cd "$1" && pwd) dry_run=${2:-}
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out=${OUT:-logs/own-$(basename "$folder" | tr -c 'A-Za-z0-9._\n-' '_')}

sizes=$("$PYTHON" - "$folder" <<'PYTHON'
import statistics
import sys
from pathlib import Path

from PIL import Image

def fail(text):
    print(f"own_images.sh: {text}", file=sys.stderr)
    sys.exit(2)

root = Path(sys.argv[1])
test = root / ("test" if (root / "test").is_dir() else "val")
if not (root / "train").is_dir() or not test.is_dir():
    fail(f"{root} needs train/ and test/ (or val/), in each a folder for every class")
train, tested = ({d.name for d in part.iterdir() if d.is_dir() and d.name[0] != "."} for part in (root / "train", test))
if len(train) < 2 or tested - train:
    fail(f"{root}: classes to train {sorted(train)}, to test {sorted(tested)}; expected two or more, and all of them in train/")
endings, sides = Image.registered_extensions(), []
files = [p for name in train for p in (root / "train" / name).rglob("[!.]*") if p.suffix.lower() in endings]
for path in files[:: len(files) // 200 + 1]:
    try:
        with Image.open(path) as image:
            sides.append(min(image.size))
    except OSError:  # the search names what cannot be read
        continue
if not sides:
    fail(f"no readable image in {root / 'train'}")
side, images = round(statistics.median(sides)), len(files)
size = next((size for size, least in ((224, 192), (128, 96), (64, 48)) if side >= least), 32)
search, retraining, batch = (  # channels, cells, epochs
    ((16, 8, 25), (24, 14, 100), 64) if images >= 20_000 else ((8, 5, 15), (16, 8, 40), 64) if images >= 5_000 else
    ((8, 5, 25), (16, 8, 60), 32) if images >= 1_000 else ((0, 0, 0), (16, 5, 100), 16)
)
steps = images // 2 // batch  # an epoch; the subspace moves 14 times in it, as published
rate = 3e-4 if steps * search[2] >= 10_000 else 3e-3  # of alpha and beta: a short search needs a larger one
print(images, side, size, *search, *retraining, batch, min(30, max(1, steps // 14)), rate)
PYTHON
)
read -r images side size C cells epochs own_C own_cells own_epochs batch freq rate <<<"$sizes"
echo "$folder: $images training images, shorter side $side pixels"
data=(--dataset folder --data "$folder" --image_size "$size") arch=${ARCH:-}

run() { printf 'python%s\n' "$(printf ' %q' "$@")"; [ -n "$dry_run" ] || "$PYTHON" "$@"; }
run_once() { # NAME COMMAND...: unless it has finished before; from its last checkpoint if there is one
    local at=$out/$1 resume=()
    shift
    if [ -f "$at/finished" ]; then echo "finished before: $at"; return; fi
    if [ -f "$at/checkpoint.pt" ]; then resume=(--resume "$at"); fi
    run "$@" --save "$at" ${resume[@]+"${resume[@]}"}
    if [ -z "$dry_run" ]; then date >"$at/finished"; fi
}
if [ "$C" = 0 ] && [ -z "$arch" ]; then
    echo "fewer than 1,000 images are too few to search with: a published cell is trained"
    arch=DDSAS_cifar10
elif [ -z "$arch" ]; then
    run_once search search.py "${data[@]}" --init_channels "$C" --layers "$cells" --epochs "$epochs" --batch_size "$batch" \
        --dss_freq "$freq" --arch_learning_rate "$rate" ${SEARCH:-}
    arch=$out/search
    run visualize.py "$arch" --all
fi
run_once retrain retrain.py "${data[@]}" --arch "$arch" --init_channels "$own_C" --layers "$own_cells" \
    --epochs "$own_epochs" --batch_size "$batch" --drop_path_prob 0.1 --cutout ${RETRAIN:-}
run evaluate.py --data "$folder" --model_path "$out/retrain"
run visualize.py "$out/retrain" --all
[ -n "$dry_run" ] || echo "pages:" "$out"/*/report.html
echo "label images: python evaluate.py --model_path $out/retrain IMAGE..."
