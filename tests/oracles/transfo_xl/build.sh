#!/bin/sh
# Builds an environment in which the last transformers that runs TransfoXL does: sh build.sh FOLDER
#
# Run it from the environment of this project, whose torch it borrows (transformers 4.35.2 asks for none of its own).
# Then: ATTENTION_ZOO_TRANSFO_XL=FOLDER python -m pytest tests/oracles/test_transfo_xl.py
set -eu
python=${PYTHON:-python3}
"$python" -m venv "$1"
"$1/bin/python" -m pip install --quiet transformers==4.35.2 tokenizers==0.15.2 huggingface-hub==0.24.7 safetensors numpy
# after the packages above, so that these come first
"$python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])" \
    > "$("$1/bin/python" -c "import site; print(site.getsitepackages()[0])")/borrowed.pth"
"$1/bin/python" -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
