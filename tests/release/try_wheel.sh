#!/usr/bin/env bash
# Try a wheel as a user has it: in a new environment, and in a folder from which the repository cannot be imported.
# usage: tests/release/try_wheel.sh WHEEL, or PYTHON=python3.13 tests/release/try_wheel.sh WHEEL
set -euo pipefail

wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../../constraints.txt")
folder=$(mktemp --directory)
app=
trap 'test -z "$app" || kill "$app"; rm -rf "$folder"' EXIT
unset PYTHONPATH
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home" OMP_NUM_THREADS=1

"${PYTHON:-python3}" -m venv "$folder/venv"
export PATH="$folder/venv/bin:$PATH"
pip install --quiet --constraint "$constraints" torch
pip install --quiet --constraint "$constraints" "$wheel[train,cli,app]"

mkdir "$folder/work"
cd "$folder/work"
echo "== The package is the wheel's, and so is the command line"
python - << 'END'
import diffusers_greedy_grow, greedy_grow

for package in (diffusers_greedy_grow, greedy_grow):
    assert "site-packages" in package.__file__, package.__file__
END
greedy-grow --version

echo "== train, on four images with captions"
python - << 'END'
from pathlib import Path

from PIL import Image

folder = Path("images")
folder.mkdir()
for color in ("red", "green", "blue", "white"):
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(folder / f"{color}.png")
    (folder / f"{color}.txt").write_text(f"a {color} square")
END
greedy-grow train --train_data_dir images --output_dir output --resolutions 8 32 --hidden_size 32 --num_layers 1 \
  --block_out_channels 8,16 --core_steps 2 --detail_steps 2 --joint_steps 0 --train_batch_size 2 --num_inference_steps 2

echo "== inspect"
greedy-grow inspect output/grown-32 | tee inspected
grep --quiet "8 px, 32 px" inspected

echo "== sample"
greedy-grow sample "a red square" --model output/grown-32 --out sample.png --num_inference_steps 2
python -c 'from PIL import Image; image = Image.open("sample.png"); image.load(); assert image.size == (32, 32), image.size'

echo "== app"
PYTHONUNBUFFERED=1 timeout 300 greedy-grow app output/grown-32 > app.log 2>&1 &
app=$!
until address=$(grep --only-matching "http://[0-9.:]*" app.log); do
  kill -0 "$app" || { cat app.log >&2; exit 1; }
  sleep 1
done
python - "$address" << 'END'
import sys
from urllib.request import urlopen

with urlopen(sys.argv[1], timeout=60) as answer:
    page = answer.read().decode()
assert "gradio" in page, page
END
echo "The wheel works."
