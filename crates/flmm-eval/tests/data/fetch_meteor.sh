#!/bin/sh
# Fetches METEOR 1.5's tables into a folder: they are inside the Python package `pycocoevalcap`, which is not installed.
#
#     sh fetch_meteor.sh DIR
#     FLMM_METEOR=DIR cargo test --release -p flmm-eval --test goldens_captions
set -eu
folder=${1:?usage: fetch_meteor.sh DIR}
mkdir -p "$folder"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download --quiet --no-deps --dest "$wheels" pycocoevalcap
python3 -c "
import sys, zipfile
wheel, folder = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    for name in ('meteor-1.5.jar', 'data/paraphrase-en.gz'):
        target = folder + '/' + name.split('/')[-1]
        with open(target, 'wb') as out:
            out.write(archive.read('pycocoevalcap/meteor/' + name))
" "$wheels"/pycocoevalcap-*.whl "$folder"
ls -l "$folder"
