#!/usr/bin/env bash
# Train an SP-ViT on the digits that scikit-learn ships, evaluate the saved
# checkpoint and draw the priors that it has learned. No download.
# Usage: [WORK_DIR=work_dirs/quickstart] quickstart.sh
set -euo pipefail

if [ "$#" -gt 0 ]; then
    echo "Usage: [WORK_DIR=work_dirs/quickstart] $0" >&2
    exit 2
fi

# So small a model gains nothing from a second thread, and loses much to it where
# other programs run beside.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ROOT=$(dirname "$0")/..
NAME=spvit-mini_1xb64-50e_digits
CONFIG=$ROOT/configs/classification/$NAME.py
WORK=${WORK_DIR:-work_dirs/quickstart}

echo "== Train $NAME (about a minute and a half)"
python "$ROOT"/tools/train.py "${CONFIG%.py}-prior-maps.py" --work-dir "$WORK"
CHECKPOINT=$(cat "$WORK/last_checkpoint")

echo "== Evaluate $CHECKPOINT on the 360 held-out digits"
python "$ROOT"/tools/test.py "$CONFIG" "$CHECKPOINT" --work-dir "$WORK/test" \
    --out "$WORK/metrics.json" --out-item metrics

echo "== Draw the learned priors"
python "$ROOT"/tools/visualization/show_priors.py "$CONFIG" "$CHECKPOINT" --out "$WORK/priors.png"

ACCURACY=$(python -c "import json, sys; print('%.2f' % json.load(open(sys.argv[1]))['accuracy/top1'])" "$WORK/metrics.json")
MAPS=$(ls -td "$WORK"/*/vis_data/vis_image | head -n 1)
LOG=$(ls -t "$WORK"/*/*.log | head -n 1)
cat <<END

== Done
   top-1 accuracy   $ACCURACY % of 360 held-out digits
   checkpoint       $CHECKPOINT
   log              $LOG
   picture          $WORK/priors.png
   while training   $MAPS

   Next, the same ViT without priors:
   source .venv/bin/activate
   python tools/train.py configs/classification/spvit-mini_0spsa_1xb64-50e_digits.py
END
